//! Mixture-of-experts layers, routers, balancing losses, up-cycling, and routing over adapters.
//!
//! [`upcycle`] turns feed-forward networks of a dense decoder into a [`MoeLayer`], a brick that keeps the decoder's
//! function until it is trained; [`AdapterRouter`] weighs frozen adapters token by token, and [`fit_adapter_router`] trains it. An
//! [`ExpertTap`] counts what either does.
#![forbid(unsafe_code)]

mod adapter_router;
mod dispatch;
mod error;
mod expert_tap;
mod gates;
mod layer;
mod losses;
mod router;
mod upcycle;

pub use adapter_router::{AdapterRouter, fit_adapter_router};
pub use dispatch::DispatchPlan;
pub use error::MoeError;
pub use expert_tap::{ExpertTap, ExpertUse};
pub use gates::AdapterGates;
pub use layer::{Balance, Dispatch, ExpertBank, ExpertLoads, MoeLayer};
pub use losses::{AuxNorm, router_z_loss, switch_balance_loss};
pub use router::{Logits, Probs, RouterConfig, Routing, TopKRouter};
pub use upcycle::{UpcycleConfig, upcycle};
