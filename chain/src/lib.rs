//! The chain-replicated checkpoint store (protocol core without I/O, store, transport) and the master.
