//! What the durable store promises, tried on a disk that loses and tears: I3, I5, I6 and I7 for a whole replica;
//! and that a joining one gets a copy that nobody feels.

mod copying;
mod crash;
mod hostile;
mod model;
mod past;
