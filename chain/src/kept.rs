//! The content of `Sent`: frames of checkpoints that were sent on and not acknowledged yet, to be sent again should the
//! next replica change. An owner has one too: what van Renesse & Schneider's clients resend to a new head. What of it is
//! needed, and when, the machines decide ([`crate::sent`]).

use std::collections::VecDeque;
use std::io;
use std::sync::{Mutex, PoisonError};

use checkpoint::{Epoch, Generation};

use crate::link::Link;
use crate::mark::{MARK_SIZE, Mark};
use crate::replica::Base;
use crate::sent::Sent;
use crate::wire::{FLAG_FULL, FLAG_HELD, FLAG_INSTALL, FLAG_KEEP, Frame, Kind, Payload};

/// Most bytes kept for one VM by a replica. Its owner bounds what is under way by the VM's memory ([`owner_keeps`]); beyond
/// this the chain goes on, but a successor that is lost then cannot be replaced without filling it again.
pub const KEPT_MAX: usize = 512 << 20;

/// Most bytes that the owner of a VM with so much memory keeps before it waits for acknowledgements: as much as the VM has,
/// so that a chain that is slow slows the VM down and is not left for it.
#[must_use]
pub const fn owner_keeps(ram_bytes: u64) -> usize {
    match ram_bytes > KEPT_MAX as u64 {
        true => ram_bytes as usize,
        false => KEPT_MAX,
    }
}
/// Buffers held ready, and the largest of them.
const BUFFERS: (usize, usize) = (64, 2 << 20);

/// Buffers that are used again, so that keeping a frame costs no copy and no page faults.
#[derive(Debug, Default)]
pub(crate) struct Buffers(Mutex<Vec<Payload>>);

impl Buffers {
    /// One to read into.
    pub(crate) fn take(&self) -> Payload {
        let mut free = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        free.pop().unwrap_or_default()
    }

    /// One that is not needed any more.
    pub(crate) fn give(&self, buffer: Payload) {
        let mut free = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if free.len() < BUFFERS.0 && buffer.capacity() <= BUFFERS.1 {
            free.push(buffer);
        }
    }
}

type Frames = Vec<(Frame, Payload)>;

/// Frames in the order they were sent.
#[derive(Debug, Default)]
pub struct Kept {
    whole: VecDeque<(Mark, Frames)>,
    open: Option<Frames>,
    bytes: usize,
}

impl Kept {
    /// Keeps one frame more. A beginning replaces a checkpoint that was left without its end.
    pub(crate) fn push(&mut self, frame: Frame, payload: Payload) {
        if frame.kind == Kind::Begin {
            self.abandon();
            self.open = Some(Vec::new());
        }
        if let Some(open) = &mut self.open {
            self.bytes += payload.len();
            open.push((frame, payload));
        }
    }

    /// Bytes of payload kept.
    #[must_use]
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// The checkpoint whose end was pushed last is whole, and is `mark`.
    pub(crate) fn close(&mut self, mark: Mark) {
        if let Some(open) = self.open.take() {
            self.whole.push_back((mark, open));
        }
    }

    /// Forgets the checkpoint that has no end yet.
    pub(crate) fn abandon(&mut self) {
        let left = self.open.take().unwrap_or_default();
        self.bytes -= left.iter().map(|(_, p)| p.len()).sum::<usize>();
    }

    /// Forgets everything up to `epoch`.
    pub(crate) fn trim(&mut self, epoch: Epoch, buffers: Option<&Buffers>) {
        while self
            .whole
            .front()
            .is_some_and(|(mark, _)| mark.epoch <= epoch)
        {
            for (_, payload) in self.whole.pop_front().into_iter().flat_map(|(_, f)| f) {
                self.bytes -= payload.len();
                if let Some(buffers) = buffers {
                    buffers.give(payload);
                }
            }
        }
    }

    /// Forgets everything.
    pub(crate) fn clear(&mut self) {
        *self = Self::default();
    }

    /// The names of the checkpoints kept.
    #[must_use]
    pub(crate) fn sent(&self) -> Sent {
        let base = self
            .whole
            .front()
            .and_then(|(_, frames)| first_base(frames));
        let mut sent = base.map(Sent::after).unwrap_or_default();
        self.whole.iter().for_each(|(mark, _)| sent.push(*mark));
        sent
    }

    /// Everything after `after`, as of `generation`; the unfinished checkpoint last.
    pub(crate) fn after(
        &self,
        after: Mark,
        generation: Generation,
    ) -> impl Iterator<Item = (Frame, &Payload)> {
        let known = self.whole.iter().position(|(mark, _)| *mark == after);
        let from = known.map_or(0, |position| position + 1);
        let whole = self.whole.range(from..).flat_map(|(_, frames)| frames);
        let frames = whole.chain(self.open.iter().flatten());
        frames.map(move |(frame, payload)| {
            let frame = Frame {
                generation,
                ..*frame
            };
            (frame, payload)
        })
    }

    /// Sends everything after `after`, as of `generation`; the unfinished checkpoint last.
    pub(crate) fn resend(
        &self,
        link: &Link,
        after: Mark,
        generation: Generation,
    ) -> io::Result<()> {
        let mut frames = self.after(after, generation);
        frames.try_for_each(|(frame, payload)| link.forward(&frame, payload))
    }

    /// Whole checkpoints kept.
    #[must_use]
    pub fn len(&self) -> usize {
        self.whole.len()
    }

    /// Whether no whole checkpoint is kept.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.whole.is_empty()
    }
}

fn first_base(frames: &Frames) -> Option<Mark> {
    let (frame, payload) = frames.first()?;
    match base_of(frame.flags, payload)? {
        Base::On { base, .. } => Some(base),
        _ => None,
    }
}

const FULL_KEEP: u32 = FLAG_FULL | FLAG_KEEP;

/// What a [`Kind::Begin`] frame's payload says; `None` if it is malformed.
#[must_use]
pub(crate) fn base_of(flags: u32, payload: &[u8]) -> Option<Base> {
    // Of what is installed its mark says it.
    let flags = match flags & FLAG_INSTALL {
        0 => flags & !FLAG_HELD,
        _ => flags,
    };
    match (flags, payload.split_at_checked(MARK_SIZE)) {
        (FLAG_FULL | FULL_KEEP, None) if payload.is_empty() => Some(Base::Nothing),
        (FLAG_INSTALL, None) if payload.is_empty() => Some(Base::Install),
        (0, Some((mark, origin))) => Some(Base::On {
            base: Mark::from_bytes(mark)?,
            origin: Generation(u64::from_le_bytes(origin.try_into().ok()?)),
        }),
        _ => None,
    }
}

/// Flags and payload of the [`Kind::Begin`] frame for `base`.
#[must_use]
pub(crate) fn begin_payload(base: Base) -> (u32, Vec<u8>) {
    match base {
        Base::Nothing => (FLAG_FULL, Vec::new()),
        Base::Install => (FLAG_INSTALL, Vec::new()),
        Base::On { base, origin } => {
            let mut payload = base.to_bytes().to_vec();
            payload.extend_from_slice(&origin.0.to_le_bytes());
            (0, payload)
        }
    }
}

/// A [`Kind::End`] frame's payload: the checkpoint installed, if any, and the encoded [`checkpoint::CheckpointEnd`].
/// `None` if it is malformed.
#[must_use]
pub(crate) fn end_of(flags: u32, payload: &[u8]) -> Option<(Option<Mark>, &[u8])> {
    if flags & FLAG_INSTALL == 0 {
        return Some((None, payload));
    }
    let (mark, end) = payload.split_at_checked(MARK_SIZE)?;
    Some((Some(Mark::from_bytes(mark)?), end))
}

#[cfg(test)]
mod tests {
    use super::*;
    use checkpoint::VmId;

    fn mark(epoch: u64) -> Mark {
        Mark {
            generation: Generation(2),
            epoch: Epoch(epoch),
            digest: 7,
            held: true,
        }
    }

    fn frame(kind: Kind, epoch: u64) -> Frame {
        Frame {
            kind,
            vm: VmId(1),
            generation: Generation(2),
            epoch: Epoch(epoch),
            flags: 0,
        }
    }

    fn keep(kept: &mut Kept, epoch: u64) {
        let base = Base::On {
            base: mark(epoch - 1),
            origin: Generation(2),
        };
        let mut payload = Payload::default();
        payload.fill(&begin_payload(base).1);
        kept.push(frame(Kind::Begin, epoch), payload);
        let mut payload = Payload::default();
        payload.fill(&[1; 100]);
        kept.push(frame(Kind::Pages, epoch), payload);
        kept.push(frame(Kind::End, epoch), Payload::default());
    }

    #[test]
    fn what_a_checkpoint_is_applied_to_comes_back_and_nothing_else_is_taken() {
        let on = Base::On {
            base: mark(4),
            origin: Generation(9),
        };
        for base in [Base::Nothing, Base::Install, on] {
            let (flags, payload) = begin_payload(base);
            assert_eq!(base_of(flags, &payload), Some(base));
            assert_eq!(base_of(flags, &[&payload[..], &[0]].concat()), None);
            assert_ne!(base_of(flags ^ FLAG_FULL, &payload), Some(base));
            let held = (base != Base::Install).then_some(base);
            assert_eq!(base_of(flags | FLAG_HELD, &payload), held);
        }
        assert_eq!(base_of(0, &[]), None);
        assert_eq!(base_of(0, &[0; 31]), None);
    }

    #[test]
    fn payloads_are_as_documented() {
        let base = Mark {
            generation: Generation(0x0102),
            epoch: Epoch(0x0304),
            digest: 0x0506_0708,
            held: true,
        };
        let origin = Generation(0x090a);
        let mark = [
            2, 1, 0, 0, 0, 0, 0, 0, 4, 3, 0, 0, 0, 0, 0, 0, 8, 7, 6, 5, 0, 0, 0, 0,
        ];
        let begin = [&mark[..], &[10, 9, 0, 0, 0, 0, 0, 0]].concat();
        assert_eq!(begin_payload(Base::On { base, origin }), (0, begin));
        let end = checkpoint::CheckpointEnd {
            pages: 1,
            disk_records: 2,
            bytes: 3,
            digest: 4,
        };
        let end = checkpoint::codec::to_bytes(&end, 4096).unwrap();
        let mut wanted = [0; 28];
        (wanted[0], wanted[8], wanted[16], wanted[24]) = (1, 2, 3, 4);
        assert_eq!(end, wanted);
        assert_eq!(end_of(0, &end), Some((None, &end[..])));
        let installs = [&mark[..], &end].concat();
        assert_eq!(
            end_of(FLAG_INSTALL, &installs),
            Some((Some(base), &end[..]))
        );
        assert_eq!(end_of(FLAG_INSTALL, &installs[..23]), None);
    }

    #[test]
    fn what_is_kept_reaches_from_its_base_to_its_end_and_is_bounded_by_acks() {
        let mut kept = Kept::default();
        for epoch in 5..=7 {
            keep(&mut kept, epoch);
            kept.close(mark(epoch));
        }
        keep(&mut kept, 8);
        let goes_on = |kept: &Kept, epoch| kept.sent().goes_on_from(None, Some(mark(epoch)));
        for epoch in 4..=7 {
            assert_eq!(goes_on(&kept, epoch), Some(mark(epoch)));
        }
        assert_eq!((goes_on(&kept, 3), goes_on(&kept, 8)), (None, None));
        kept.trim(Epoch(6), None);
        assert_eq!(kept.len(), 1);
        assert_eq!(
            (goes_on(&kept, 6), goes_on(&kept, 5)),
            (Some(mark(6)), None)
        );
        kept.abandon();
        kept.trim(Epoch(7), None);
        assert_eq!(kept.bytes(), 0, "every byte is accounted for");
        assert_eq!(kept.sent(), Sent::default());
    }

    #[test]
    fn a_new_beginning_replaces_a_checkpoint_without_an_end() {
        let mut kept = Kept::default();
        keep(&mut kept, 5);
        keep(&mut kept, 5);
        kept.close(mark(5));
        assert_eq!(kept.whole[0].1.len(), 3);
        assert_eq!(kept.bytes, 32 + 100);
    }
}
