//! What a checkpoint *is*: ids, machine-state types, page and disk records, codec. No I/O, no KVM.
//!
//! A checkpoint of epoch e is page records, disk records and one machine state; [`Stage`] assembles it at a replica
//! and hands it on only when it is whole. Byte layouts: `docs/checkpoint-format.md`.

pub mod bitmap;
pub mod codec;
pub mod cpu;
pub mod disk;
pub mod ids;
pub mod machine;
pub mod page;
pub mod stage;

pub use bitmap::PageBitmap;
pub use codec::CodecError;
pub use cpu::{CpuFeatures, FeatureWord};
pub use disk::{DISK_HEADER, DISK_RECORD_MAX, DiskOp, DiskRecord, DiskRecordError, disk_records};
pub use ids::{
    ClusterId, Epoch, Generation, HostId, HostUuid, NameError, RequestId, UuidError, VmId,
};
pub use machine::{DeviceState, MACHINE_LIMIT, MachineError, MachineState, RamRange};
pub use page::{
    Encoded, EncoderOptions, Encoding, PAGE_HEADER, PAGE_SIZE, Page, PageEncoder, PageError,
    PageRecord, records,
};
pub use stage::{CheckpointEnd, Stage, StageError, StageLimits, Tally, Whole};
