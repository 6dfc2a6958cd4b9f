//! Page records: what became of a guest page, encoded the cheapest way that pays.
//!
//! ```text
//!  0        8                10           11            12
//! | gfn u64 | payload_len u16 | encoding u8 | reserved=0 | CRC32C u32 of the decoded 4096 bytes | payload |
//! ```
//!
//! The checksum is computed where the page is captured and verified where it is put into an image: end to end.
//!
//! A delta's payload is a list of runs against the page's previous content: `skip u16, len u16, len bytes`. Most
//! pages that a guest dirties change in a few words, so a delta is tried first; LZ4 comes next, with bail-out (see
//! [`PageEncoder`]); a page for which neither pays is sent as it is.

/// Bytes per guest page.
pub const PAGE_SIZE: usize = 4096;
/// One guest page.
pub type Page = [u8; PAGE_SIZE];
/// Size of a record's header in bytes.
pub const PAGE_HEADER: usize = 16;

/// A delta longer than this is not tried further.
const DELTA_MAX: usize = 2048;
/// LZ4 pays if it saves at least a quarter.
const LZ4_MAX: usize = PAGE_SIZE * 3 / 4;
/// Content is compared, and runs are made of, words of this many bytes.
const WORD: usize = 8;

/// How a page is encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoding {
    /// 4096 bytes as they are.
    Raw = 0,
    /// All zero; no payload.
    Zero = 1,
    /// One LZ4 block.
    Lz4 = 2,
    /// Runs against the previous content.
    Delta = 3,
}

/// What [`PageEncoder::encode`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoded {
    /// Equal to its previous content: nothing was written.
    Unchanged,
    /// Written as zero.
    Zero,
    /// Written as a delta.
    Delta,
    /// Written as LZ4.
    Lz4,
    /// Written as it is.
    Raw,
}

/// Choices of the encoder.
#[derive(Clone, Copy, Debug)]
pub struct EncoderOptions {
    /// Try LZ4 where a delta does not pay.
    pub lz4: bool,
}

/// Encodes pages. Remembers how LZ4 fared: after pages that did not shrink it is tried less and less often (every
/// 2nd, 4th, ... 64th page), and at once again after one that did.
#[derive(Debug)]
pub struct PageEncoder {
    options: EncoderOptions,
    scratch: Vec<u8>,
    skip: u32,
    back_off: u32,
}

/// Why bytes are not page records, or a record not a page.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PageError {
    /// The bytes end inside a record.
    #[error("page record is cut off: {needed} bytes needed, {found} left")]
    Truncated {
        /// Needed.
        needed: usize,
        /// Left.
        found: usize,
    },
    /// An encoding this version does not know.
    #[error("page record with unknown encoding {0}")]
    Encoding(u8),
    /// Header or payload is not of its encoding's form.
    #[error("page record of frame {gfn:#x} is malformed: {what}")]
    Malformed {
        /// The frame.
        gfn: u64,
        /// What is wrong.
        what: &'static str,
    },
    /// Decoded to something else than was captured.
    #[error("page of frame {gfn:#x} does not match its checksum")]
    Checksum {
        /// The frame.
        gfn: u64,
    },
}

impl PageEncoder {
    /// A fresh encoder.
    #[must_use]
    pub fn new(options: EncoderOptions) -> Self {
        let scratch = vec![0; lz4_flex::block::get_maximum_output_size(PAGE_SIZE)];
        Self {
            options,
            scratch,
            skip: 0,
            back_off: 0,
        }
    }

    /// Appends a record of `page` to `out`, or nothing if it equals `prev`.
    pub fn encode(
        &mut self,
        gfn: u64,
        page: &Page,
        prev: Option<&Page>,
        out: &mut Vec<u8>,
    ) -> Encoded {
        if let Some(prev) = prev
            && prev == page
        {
            return Encoded::Unchanged;
        }
        let start = out.len();
        out.extend_from_slice(&[0; PAGE_HEADER]);
        let encoding = if is_zero(page) {
            Encoding::Zero
        } else if prev.is_some_and(|prev| delta(prev, page, out)) {
            Encoding::Delta
        } else {
            out.truncate(start + PAGE_HEADER);
            if self.lz4(page, out) {
                Encoding::Lz4
            } else {
                out.extend_from_slice(page);
                Encoding::Raw
            }
        };
        let payload = (out.len() - start - PAGE_HEADER) as u16;
        let header = &mut out[start..start + PAGE_HEADER];
        header[..8].copy_from_slice(&gfn.to_le_bytes());
        header[8..10].copy_from_slice(&payload.to_le_bytes());
        header[10] = encoding as u8;
        header[12..].copy_from_slice(&crc32c::crc32c(page).to_le_bytes());
        match encoding {
            Encoding::Raw => Encoded::Raw,
            Encoding::Zero => Encoded::Zero,
            Encoding::Lz4 => Encoded::Lz4,
            Encoding::Delta => Encoded::Delta,
        }
    }

    fn lz4(&mut self, page: &Page, out: &mut Vec<u8>) -> bool {
        if !self.options.lz4 {
            return false;
        }
        if self.skip > 0 {
            self.skip -= 1;
            return false;
        }
        match lz4_flex::block::compress_into(page, &mut self.scratch) {
            Ok(length) if length <= LZ4_MAX => {
                self.back_off = 0;
                out.extend_from_slice(&self.scratch[..length]);
                true
            }
            _ => {
                self.back_off = (self.back_off * 2).clamp(1, 64);
                self.skip = self.back_off;
                false
            }
        }
    }
}

fn is_zero(page: &Page) -> bool {
    page.as_chunks::<64>()
        .0
        .iter()
        .all(|c| c.iter().fold(0, |a, b| a | b) == 0)
}

/// Appends the runs by which `new` differs from `old`; false (with rubbish appended) if they grow too long.
fn delta(old: &Page, new: &Page, out: &mut Vec<u8>) -> bool {
    let start = out.len();
    let (old_lines, _) = old.as_chunks::<64>();
    let (new_lines, _) = new.as_chunks::<64>();
    // The open run, in words from the page's start: [first, end).
    let mut run: Option<(usize, usize)> = None;
    let mut sent_to = 0;
    let flush = |run: (usize, usize), sent_to: &mut usize, out: &mut Vec<u8>| {
        let (first, end) = (run.0 * WORD, run.1 * WORD);
        out.extend_from_slice(&((first - *sent_to) as u16).to_le_bytes());
        out.extend_from_slice(&((end - first) as u16).to_le_bytes());
        out.extend_from_slice(&new[first..end]);
        *sent_to = end;
    };
    for (line, (a, b)) in old_lines.iter().zip(new_lines).enumerate() {
        if a == b {
            continue;
        }
        for word in 0..64 / WORD {
            let at = word * WORD..(word + 1) * WORD;
            if a[at.clone()] == b[at] {
                continue;
            }
            let word = line * (64 / WORD) + word;
            run = match run {
                // Joined over a gap of one word: 4 bytes more than another run's header, but a third quicker where
                // every other word changed (examples/page_speed.rs).
                Some((first, end)) if word <= end + 1 => Some((first, word + 1)),
                Some(done) => {
                    flush(done, &mut sent_to, out);
                    Some((word, word + 1))
                }
                None => Some((word, word + 1)),
            };
        }
        if out.len() - start + run.map_or(0, |(first, end)| (end - first) * WORD) > DELTA_MAX {
            return false;
        }
    }
    if let Some(run) = run {
        flush(run, &mut sent_to, out);
    }
    out.len() - start <= DELTA_MAX
}

/// One page record, its payload not yet decoded.
#[derive(Clone, Copy, Debug)]
pub struct PageRecord<'a> {
    /// Guest frame number: the guest physical address in pages.
    pub gfn: u64,
    /// How the payload is encoded.
    pub encoding: Encoding,
    /// CRC32C of the decoded page.
    pub crc: u32,
    /// The payload.
    pub payload: &'a [u8],
}

/// The records in `buf`. After an error the iterator ends.
pub fn records(buf: &[u8]) -> impl Iterator<Item = Result<PageRecord<'_>, PageError>> {
    let mut rest = buf;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let parsed = parse(rest);
        rest = parsed.as_ref().map_or(&[], |(_, rest)| rest);
        Some(parsed.map(|(record, _)| record))
    })
}

fn parse(buf: &[u8]) -> Result<(PageRecord<'_>, &[u8]), PageError> {
    let Some((h, rest)) = buf.split_first_chunk::<PAGE_HEADER>() else {
        return Err(PageError::Truncated {
            needed: PAGE_HEADER,
            found: buf.len(),
        });
    };
    let gfn = u64::from_le_bytes([h[0], h[1], h[2], h[3], h[4], h[5], h[6], h[7]]);
    let length = usize::from(u16::from_le_bytes([h[8], h[9]]));
    let encoding = match h[10] {
        0 => Encoding::Raw,
        1 => Encoding::Zero,
        2 => Encoding::Lz4,
        3 => Encoding::Delta,
        other => return Err(PageError::Encoding(other)),
    };
    let fits = match encoding {
        Encoding::Raw => length == PAGE_SIZE,
        Encoding::Zero => length == 0,
        Encoding::Lz4 | Encoding::Delta => (1..=PAGE_SIZE).contains(&length),
    };
    if !fits || h[11] != 0 {
        return Err(PageError::Malformed {
            gfn,
            what: "the header",
        });
    }
    let Some((payload, rest)) = rest.split_at_checked(length) else {
        return Err(PageError::Truncated {
            needed: length,
            found: rest.len(),
        });
    };
    let crc = u32::from_le_bytes([h[12], h[13], h[14], h[15]]);
    Ok((
        PageRecord {
            gfn,
            encoding,
            crc,
            payload,
        },
        rest,
    ))
}

impl PageRecord<'_> {
    /// Decodes into `out`, given the page's previous content, and verifies the checksum.
    ///
    /// # Errors
    /// [`PageError`]; `out` then holds rubbish. Never panics.
    pub fn decode(&self, prev: &Page, out: &mut Page) -> Result<(), PageError> {
        let malformed = |what| PageError::Malformed {
            gfn: self.gfn,
            what,
        };
        match self.encoding {
            Encoding::Raw => {
                out.copy_from_slice(
                    self.payload
                        .get(..PAGE_SIZE)
                        .ok_or_else(|| malformed("the payload"))?,
                );
            }
            Encoding::Zero => out.fill(0),
            Encoding::Lz4 => {
                let length = lz4_flex::block::decompress_into(self.payload, out)
                    .map_err(|_| malformed("LZ4"))?;
                if length != PAGE_SIZE {
                    return Err(malformed("LZ4 of another length"));
                }
            }
            Encoding::Delta => {
                *out = *prev;
                let (mut rest, mut at) = (self.payload, 0usize);
                while !rest.is_empty() {
                    let Some((h, after)) = rest.split_first_chunk::<4>() else {
                        return Err(malformed("a run's header"));
                    };
                    at += usize::from(u16::from_le_bytes([h[0], h[1]]));
                    let length = usize::from(u16::from_le_bytes([h[2], h[3]]));
                    let Some((bytes, after)) = after.split_at_checked(length) else {
                        return Err(malformed("a run is cut off"));
                    };
                    out.get_mut(at..at + length)
                        .ok_or_else(|| malformed("a run beyond the page"))?
                        .copy_from_slice(bytes);
                    at += length;
                    rest = after;
                }
            }
        }
        if crc32c::crc32c(&out[..]) != self.crc {
            return Err(PageError::Checksum { gfn: self.gfn });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn encoder() -> PageEncoder {
        PageEncoder::new(EncoderOptions { lz4: true })
    }

    fn noise(mut seed: u64) -> Page {
        std::array::from_fn(|_| {
            seed = seed
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (seed >> 33) as u8
        })
    }

    fn decoded(bytes: &[u8], prev: &Page) -> Page {
        let record = records(bytes).next().unwrap().unwrap();
        let mut out = [0xee; PAGE_SIZE];
        record.decode(prev, &mut out).unwrap();
        out
    }

    #[test]
    fn each_kind_of_page_gets_its_encoding() {
        let (old, mut text) = (noise(1), [b'a'; PAGE_SIZE]);
        text[100] = b'b';
        let mut touched = old;
        touched[2000] ^= 1;
        for (page, prev, expected) in [
            (old, Some(old), Encoded::Unchanged),
            ([0; PAGE_SIZE], Some(old), Encoded::Zero),
            (touched, Some(old), Encoded::Delta),
            (text, Some(old), Encoded::Lz4),
            (text, None, Encoded::Lz4),
            (noise(2), Some(old), Encoded::Raw),
        ] {
            let mut out = Vec::new();
            assert_eq!(
                encoder().encode(5, &page, prev.as_ref(), &mut out),
                expected
            );
            if expected == Encoded::Unchanged {
                assert!(out.is_empty());
            } else {
                assert_eq!(decoded(&out, &prev.unwrap_or([0; PAGE_SIZE])), page);
            }
        }
    }

    #[test]
    fn one_changed_word_costs_tens_of_bytes() {
        let old = noise(3);
        let mut new = old;
        new[8..16].copy_from_slice(&[1; 8]);
        let mut out = Vec::new();
        encoder().encode(0, &new, Some(&old), &mut out);
        assert_eq!(out.len(), PAGE_HEADER + 4 + 8);
    }

    #[test]
    fn lz4_is_given_up_on_noise_and_taken_up_again() {
        let mut encoder = encoder();
        let mut out = Vec::new();
        for i in 0..200 {
            assert_eq!(
                encoder.encode(i, &noise(i + 10), None, &mut out),
                Encoded::Raw
            );
        }
        assert!(encoder.skip > 0 || encoder.back_off == 64);
        let kinds: Vec<Encoded> = (0..70)
            .map(|i| encoder.encode(i, &[9; PAGE_SIZE], None, &mut out))
            .collect();
        let first = kinds
            .iter()
            .position(|k| *k == Encoded::Lz4)
            .expect("tried again within 65 pages");
        assert!(kinds[first..].iter().all(|k| *k == Encoded::Lz4));
    }

    #[test]
    fn a_wrong_base_is_found_by_the_checksum() {
        let old = noise(4);
        let mut new = old;
        new[0] ^= 0xff;
        let mut out = Vec::new();
        encoder().encode(0, &new, Some(&old), &mut out);
        let record = records(&out).next().unwrap().unwrap();
        assert_eq!(
            record.decode(&noise(5), &mut [0; PAGE_SIZE]),
            Err(PageError::Checksum { gfn: 0 })
        );
    }

    proptest! {
        #[test]
        fn any_edit_survives_the_round_trip(
            seed in any::<u64>(),
            edits in proptest::collection::vec((0usize..PAGE_SIZE, any::<u8>()), 0..600),
            with_prev in any::<bool>(),
        ) {
            let old = noise(seed);
            let mut new = old;
            for (at, value) in edits { new[at] = value; }
            let mut out = Vec::new();
            let encoded = encoder().encode(7, &new, with_prev.then_some(&old), &mut out);
            if encoded == Encoded::Unchanged {
                prop_assert_eq!(old, new);
            } else {
                prop_assert_eq!(decoded(&out, &old), new);
                prop_assert!(out.len() <= PAGE_HEADER + PAGE_SIZE);
            }
        }

        #[test]
        fn hostile_bytes_never_panic_and_never_pass_for_another_page(
            bytes in proptest::collection::vec(any::<u8>(), 0..200),
            encoding in 0u8..5,
            flip in 0usize..400,
        ) {
            let mut bytes = bytes;
            if bytes.len() > 16 {
                let length = ((bytes.len() - 16) as u16).to_le_bytes();
                bytes[8..10].copy_from_slice(&length);
                bytes[10] = encoding;
                bytes[11] = 0;
            }
            let mut out = [0; PAGE_SIZE];
            for record in records(&bytes).flatten() { let _ = record.decode(&[1; PAGE_SIZE], &mut out); }
            // A flipped bit in a good record's payload or checksum never yields a page without an error.
            let old = noise(9);
            let mut new = old;
            new[64..96].fill(3);
            let mut good = Vec::new();
            encoder().encode(1, &new, Some(&old), &mut good);
            let bit = 10 * 8 + flip % ((good.len() - 10) * 8);
            good[bit / 8] ^= 1 << (bit % 8);
            for record in records(&good).flatten() {
                if record.decode(&old, &mut out).is_ok() { prop_assert_eq!(out, new); }
            }
        }
    }
}
