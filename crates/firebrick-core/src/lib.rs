//! Sites, selectors, plans, budgets, bricks, devices and seeds: the vocabulary every firebrick crate shares.
//!
//! A pretrained transformer is *wiring* with *sites* ([`Site`]); everything that specializes it is a [`Brick`] that
//! sits at sites. A [`Selector`] names sites, a [`LayerPlan`] gives them settings, [`allocate`] spends a budget over
//! them, and a [`Run`] carries the state of one forward pass.
//!
//! ```
//! use firebrick_core::{Part, Selector, Site};
//! let selector: Selector = "layers.4-7.mlp.{up,down}, head".parse()?;
//! assert!(selector.matches(Site::layer(5, Part::MlpUp), 12));
//! assert!(!selector.matches(Site::layer(5, Part::MlpGate), 12));
//! # Ok::<(), firebrick_core::SelectorError>(())
//! ```
#![forbid(unsafe_code)]

mod atomic;
mod brick;
mod budget;
mod device;
mod memory;
mod plan;
mod progress;
mod read;
mod run;
mod seed;
mod selector;
mod site;

pub use atomic::{AtomicFile, folder, sync_folder, write_atomic};
pub use brick::{Base, Brick, LowRank, Skip, Tap, Taps};
pub use budget::{
    Baseline, BudgetError, Choice, allocate, allocate_baseline, allocate_exact, allocate_greedy,
};
pub use device::{DeviceError, DeviceInfo, DeviceSpec, list_devices};
pub use memory::{available_bytes, peak_resident_bytes, resident_bytes};
pub use plan::{Coverage, LayerPlan, PlanError, ResolvedPlan, Rule, RuleCoverage, Settings};
pub use progress::{Cancelled, Event, Progress, Silent, Task};
pub use read::{MAX_SETTINGS, read_file, read_text};
pub use run::{Mode, Run};
pub use seed::Seed;
pub use selector::{Selector, SelectorError, bounded_regex, closest};
pub use site::{ParseSiteError, Part, Site, SiteEntry, SiteKind, SiteSet, SiteTable};
