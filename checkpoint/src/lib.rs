//! What a checkpoint is: ids, machine-state types, page and disk records, codec. No I/O, no KVM.
