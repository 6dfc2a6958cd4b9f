//! What was sent on and not acknowledged, as `src/kept.rs` keeps it (that one writes to sockets).

use std::collections::VecDeque;

use chain::Mark;
use chain::replica::Base;
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

    pub fn reaches(&self, mark: Mark, base: Option<Mark>) -> bool {
        let first = match self.whole.front() {
            Some((_, messages)) => match messages.first() {
                Some(Message::Begin {
                    base: Base::On { base, .. },
                    ..
                }) => Some(*base),
                _ => None,
            },
            None => base,
        };
        first == Some(mark) || self.whole.iter().any(|(kept, _)| *kept == mark)
    }

    pub fn after(&self, after: Option<Mark>) -> Vec<Message> {
        let known = self.whole.iter().position(|(m, _)| Some(*m) == after);
        let from = known.map_or(0, |position| position + 1);
        let whole = self.whole.range(from..).flat_map(|(_, messages)| messages);
        whole.chain(self.open.iter().flatten()).cloned().collect()
    }

    pub fn len(&self) -> usize {
        self.whole.len()
    }
}
