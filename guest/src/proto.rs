//! The probe guest's wire protocol: one definition for the guest's image (no_std, path-included) and the host's clients.
//!
//! Service [`PORT`] over TCP. A connection carries fixed-size little-endian requests one way and equally numbered
//! responses the other way, in request order. A client may keep up to [`MAX_OUTSTANDING`] requests unanswered on a
//! connection; the guest reads no further than that, so a client that keeps more is only slowed down. A request
//! the guest cannot parse (bad magic) closes the connection; one it does not know is answered with
//! [`Status::BadOp`]. The guest does not look for repeated `seq`: each request that arrives is executed.
//!
//! | request | bytes | | response | bytes |
//! |---|---|---|---|---|
//! | magic [`REQUEST_MAGIC`] | 0..4 | | magic [`RESPONSE_MAGIC`] | 0..4 |
//! | op | 4..6 | | op | 4..6 |
//! | flags | 6..8 | | status | 6..8 |
//! | seq | 8..16 | | seq | 8..16 |
//! | arg0 | 16..24 | | counter | 16..24 |
//! | arg1 | 24..32 | | passes | 24..32 |
//! | | | | disk_counter | 32..40 |
//! | | | | uptime_us | 40..48 |
//!
//! The same port number's UDP side is unused; UDP [`ECHO_PORT`] echoes every datagram, and ICMP echo is answered.
//!
//! On its first disk the guest keeps one block of [`DISK_BLOCK`] bytes at offset 0: eight sectors, each beginning with
//! [`DISK_MAGIC`], the counter (u64) and the sector's index (u64), little endian. Sectors that disagree are a torn write.

/// TCP port of the request/response service.
pub const PORT: u16 = 7777;
/// UDP port whose datagrams come back unchanged.
pub const ECHO_PORT: u16 = 7;
/// Requests a client may leave unanswered on one connection before the guest stops reading from it.
pub const MAX_OUTSTANDING: usize = 64;
/// Connections served at the same time; further ones are refused (RST).
pub const MAX_CONNECTIONS: usize = 8;
/// First four bytes of a request ("UPRQ").
pub const REQUEST_MAGIC: u32 = u32::from_le_bytes(*b"UPRQ");
/// First four bytes of a response ("UPRS").
pub const RESPONSE_MAGIC: u32 = u32::from_le_bytes(*b"UPRS");
/// Size of a request in bytes.
pub const REQUEST_LEN: usize = 32;
/// Size of a response in bytes.
pub const RESPONSE_LEN: usize = 48;
/// Request flag, with [`Op::Incr`]: flush the disk after the write and before the reply.
pub const FLAG_FLUSH: u16 = 1;
/// Request flag, with [`Op::Incr`]: reply without waiting for the disk (the counter is still written to it later).
pub const FLAG_NO_WAIT: u16 = 2;
/// Size in bytes of the counter's block at offset 0 of the disk.
pub const DISK_BLOCK: usize = 4096;
/// Size in bytes of one sector of that block.
pub const DISK_SECTOR: usize = 512;
/// First eight bytes of each sector of the counter's block.
pub const DISK_MAGIC: [u8; 8] = *b"UPROBE1\0";

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Op {
    /// Adds one to the counter in memory, writes it to the disk if there is one, then replies with the new value.
    Incr = 1,
    /// Replies with the counter as it is in memory.
    Read = 2,
    /// Sets the load: `arg0` pages dirtied per pass (0 = idle), `arg1` iterations of work after each page.
    /// More pages than the guest has are cut to what it has; the reply's `counter` is the number in force.
    SetLoad = 3,
    /// Replies with counters only, like [`Op::Read`]; kept apart so that benches do not count as service requests.
    Stats = 4,
    /// Reads the counter's block back from the disk; the reply's `disk_counter` is what the disk holds.
    ReadDisk = 5,
}

impl Op {
    /// The operation of that number, if there is one.
    pub const fn from_u16(n: u16) -> Option<Op> {
        match n {
            1 => Some(Op::Incr),
            2 => Some(Op::Read),
            3 => Some(Op::SetLoad),
            4 => Some(Op::Stats),
            5 => Some(Op::ReadDisk),
            _ => None,
        }
    }
}

/// How a request went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum Status {
    /// Done.
    Ok = 0,
    /// The operation's number is unknown; nothing was done.
    BadOp = 1,
    /// The guest has no disk ([`Op::ReadDisk`] only; [`Op::Incr`] without a disk is `Ok`).
    NoDisk = 2,
    /// The disk refused the read, write or flush. After [`Op::Incr`] the counter in memory did go up.
    DiskError = 3,
    /// The block on the disk is not one whole counter block ([`Op::ReadDisk`]).
    DiskTorn = 4,
}

impl Status {
    /// The status of that number, if there is one.
    pub const fn from_u16(n: u16) -> Option<Status> {
        match n {
            0 => Some(Status::Ok),
            1 => Some(Status::BadOp),
            2 => Some(Status::NoDisk),
            3 => Some(Status::DiskError),
            4 => Some(Status::DiskTorn),
            _ => None,
        }
    }
}

/// A request as it travels. `op` is kept as a number: the guest answers numbers it does not know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// Number of an [`Op`].
    pub op: u16,
    /// `FLAG_*` bits; unknown bits are ignored.
    pub flags: u16,
    /// The client's number for this request, returned in the response.
    pub seq: u64,
    /// First argument, see [`Op`].
    pub arg0: u64,
    /// Second argument, see [`Op`].
    pub arg1: u64,
}

/// A response as it travels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Response {
    /// The request's `op`, returned.
    pub op: u16,
    /// Number of a [`Status`].
    pub status: u16,
    /// The request's `seq`, returned.
    pub seq: u64,
    /// The counter in memory after the request (after [`Op::SetLoad`]: pages per pass in force).
    pub counter: u64,
    /// Whole passes of the load loop since boot.
    pub passes: u64,
    /// The newest counter value the disk has confirmed; 0 without a disk.
    pub disk_counter: u64,
    /// The guest's monotonic clock, microseconds since its boot; never runs backwards, also not across a failover.
    pub uptime_us: u64,
}

/// Bytes that are not a message of this protocol: the magic number is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadMagic(
    /// The four bytes found in its place.
    pub u32,
);

impl core::fmt::Display for BadMagic {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "not a probe message: magic {:#010x}", self.0)
    }
}

impl core::error::Error for BadMagic {}

impl Request {
    /// A request without flags and arguments.
    pub const fn new(op: Op, seq: u64) -> Request {
        Request {
            op: op as u16,
            flags: 0,
            seq,
            arg0: 0,
            arg1: 0,
        }
    }

    /// [`Op::SetLoad`]: `pages` dirtied per pass, `work` iterations after each.
    pub const fn set_load(seq: u64, pages: u64, work: u64) -> Request {
        Request {
            op: Op::SetLoad as u16,
            flags: 0,
            seq,
            arg0: pages,
            arg1: work,
        }
    }

    /// The request's bytes.
    pub fn to_bytes(self) -> [u8; REQUEST_LEN] {
        let mut b = [0; REQUEST_LEN];
        b[0..4].copy_from_slice(&REQUEST_MAGIC.to_le_bytes());
        b[4..6].copy_from_slice(&self.op.to_le_bytes());
        b[6..8].copy_from_slice(&self.flags.to_le_bytes());
        b[8..16].copy_from_slice(&self.seq.to_le_bytes());
        b[16..24].copy_from_slice(&self.arg0.to_le_bytes());
        b[24..32].copy_from_slice(&self.arg1.to_le_bytes());
        b
    }

    /// Parses a request; any op and any flags pass.
    pub fn from_bytes(b: &[u8; REQUEST_LEN]) -> Result<Request, BadMagic> {
        let magic = le32(b, 0);
        if magic != REQUEST_MAGIC {
            return Err(BadMagic(magic));
        }
        Ok(Request {
            op: le16(b, 4),
            flags: le16(b, 6),
            seq: le64(b, 8),
            arg0: le64(b, 16),
            arg1: le64(b, 24),
        })
    }
}

impl Response {
    /// The response's bytes.
    pub fn to_bytes(self) -> [u8; RESPONSE_LEN] {
        let mut b = [0; RESPONSE_LEN];
        b[0..4].copy_from_slice(&RESPONSE_MAGIC.to_le_bytes());
        b[4..6].copy_from_slice(&self.op.to_le_bytes());
        b[6..8].copy_from_slice(&self.status.to_le_bytes());
        b[8..16].copy_from_slice(&self.seq.to_le_bytes());
        b[16..24].copy_from_slice(&self.counter.to_le_bytes());
        b[24..32].copy_from_slice(&self.passes.to_le_bytes());
        b[32..40].copy_from_slice(&self.disk_counter.to_le_bytes());
        b[40..48].copy_from_slice(&self.uptime_us.to_le_bytes());
        b
    }

    /// Parses a response; any op and any status pass.
    pub fn from_bytes(b: &[u8; RESPONSE_LEN]) -> Result<Response, BadMagic> {
        let magic = le32(b, 0);
        if magic != RESPONSE_MAGIC {
            return Err(BadMagic(magic));
        }
        Ok(Response {
            op: le16(b, 4),
            status: le16(b, 6),
            seq: le64(b, 8),
            counter: le64(b, 16),
            passes: le64(b, 24),
            disk_counter: le64(b, 32),
            uptime_us: le64(b, 40),
        })
    }
}

/// The counter's block as the guest writes it: [`DISK_BLOCK`] bytes, every sector stamped.
pub fn fill_disk_block(counter: u64, block: &mut [u8; DISK_BLOCK]) {
    block.fill(0);
    for (i, s) in block.chunks_exact_mut(DISK_SECTOR).enumerate() {
        s[0..8].copy_from_slice(&DISK_MAGIC);
        s[8..16].copy_from_slice(&counter.to_le_bytes());
        s[16..24].copy_from_slice(&(i as u64).to_le_bytes());
    }
}

/// The counter a disk's first block holds: `None` if the block is torn or was never written by a probe guest.
pub fn parse_disk_block(block: &[u8; DISK_BLOCK]) -> Option<u64> {
    let counter = le64(block, 8);
    for (i, s) in block.chunks_exact(DISK_SECTOR).enumerate() {
        if s[0..8] != DISK_MAGIC || le64(s, 8) != counter || le64(s, 16) != i as u64 {
            return None;
        }
    }
    Some(counter)
}

fn le16(b: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([b[at], b[at + 1]])
}

fn le32(b: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]])
}

fn le64(b: &[u8], at: usize) -> u64 {
    u64::from(le32(b, at)) | u64::from(le32(b, at + 4)) << 32
}
