//! The frames of what was sent on and not acknowledged, as `src/kept.rs` keeps them (that one writes to sockets). What of
//! them is sent, and when, the production machines say.

use std::collections::VecDeque;

use chain::Mark;
use chain::replica::Base;
use chain::sent::Sent;
use checkpoint::Epoch;

use super::Message;

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Kept {
    whole: VecDeque<(Mark, Vec<Message>)>,
    open: Option<Vec<Message>>,
}

impl Kept {
    pub fn push(&mut self, message: Message) {
        if matches!(message, Message::Begin { .. }) {
            self.open = Some(Vec::new());
        }
        if let Some(open) = &mut self.open {
            open.push(message);
        }
    }

    pub fn close(&mut self, mark: Mark) {
        if let Some(open) = self.open.take() {
            self.whole.push_back((mark, open));
        }
    }

    pub fn abandon(&mut self) {
        self.open = None;
    }

    pub fn trim(&mut self, epoch: Epoch) {
        while self.whole.front().is_some_and(|(m, _)| m.epoch <= epoch) {
            self.whole.pop_front();
        }
    }

    pub fn clear(&mut self) {
        *self = Self::default();
    }

    /// The names of what is kept.
    pub fn sent(&self) -> Sent {
        let base = self
            .whole
            .front()
            .and_then(|(_, messages)| match messages.first() {
                Some(Message::Begin {
                    base: Base::On { base, .. },
                    ..
                }) => Some(*base),
                _ => None,
            });
        let mut sent = base.map(Sent::after).unwrap_or_default();
        self.whole.iter().for_each(|(mark, _)| sent.push(*mark));
        sent
    }

    pub fn after(&self, after: Option<Mark>) -> Vec<Message> {
        let known = self.whole.iter().position(|(m, _)| Some(*m) == after);
        let from = known.map_or(0, |position| position + 1);
        let whole = self.whole.range(from..).flat_map(|(_, messages)| messages);
        whole.chain(self.open.iter().flatten()).cloned().collect()
    }
}
