//! Tests of mixtures of experts as bricks.

mod adapters;
mod layer;
mod learning;
mod reference;
mod upcycling;
