//! The probe guest: a small freestanding guest for the demo and the benchmarks.
