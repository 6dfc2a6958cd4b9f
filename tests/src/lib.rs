//! Whole-system tests: several hosts, real guests, failures.
