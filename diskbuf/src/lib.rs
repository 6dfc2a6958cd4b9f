//! Disk writes held per epoch; mirror images; the activation record.
