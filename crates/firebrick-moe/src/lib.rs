//! Mixture-of-experts layers, routers, balancing losses, up-cycling, and routing over adapters.
#![forbid(unsafe_code)]

mod adapter_router;
mod gates;

pub use adapter_router::AdapterRouter;
pub use gates::AdapterGates;
