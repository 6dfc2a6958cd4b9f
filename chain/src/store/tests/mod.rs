//! What the durable store promises, tried on a disk that loses and tears: I3, I5, I6 and I7 for a whole replica.

mod crash;
mod hostile;
mod model;
mod past;
