//! The state of one forward pass.

use std::any::{Any, TypeId};
use std::collections::HashMap;

use burn::tensor::{Int, Tensor};

use crate::{Base, Brick, LowRank, Seed, Site};

/// Whether a forward pass trains or infers; dropout and routing noise are on in [`Mode::Train`] only.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// Inference: no randomness.
    #[default]
    Infer,
    /// Training.
    Train,
}

/// The state of one forward pass: the bricks in force, auxiliary losses, and whatever bricks and wirings keep
/// between sites (key-value cache, taps, gates, router state), each under its own type.
///
/// It replaces globals, thread-locals and hidden state inside modules.
#[derive(Default)]
pub struct Run<'a> {
    bricks: &'a [&'a dyn Brick],
    state: HashMap<TypeId, Box<dyn Any>>,
    /// What is made from the bricks.
    made: HashMap<TypeId, Box<dyn Any>>,
    losses: Vec<(String, Tensor<1>)>,
    /// Training or inference.
    pub mode: Mode,
    /// Seed of every random draw of this pass; vary it from step to step.
    pub seed: Seed,
    /// The token ids `[batch, tokens]` of this pass, set by the wiring.
    pub tokens: Option<Tensor<2, Int>>,
}

impl<'a> Run<'a> {
    /// A pass with these bricks, the last one on top.
    pub fn new(bricks: &'a [&'a dyn Brick]) -> Self {
        Run { bricks, ..Run::default() }
    }

    /// The same pass going on with these bricks in place of the others; all state stays, but for what was made [of them](Run::of_bricks).
    pub fn with_bricks<'b>(self, bricks: &'b [&'b dyn Brick]) -> Run<'b> {
        let Run { bricks: _, made: _, state, losses, mode, seed, tokens } = self;
        Run { bricks, made: HashMap::new(), state, losses, mode, seed, tokens }
    }

    /// The bricks in force, the last one on top.
    pub fn bricks(&self) -> &'a [&'a dyn Brick] {
        self.bricks
    }

    /// Whether no brick sits at `site`; wirings use it to take a fused path through bare sites.
    pub fn is_bare(&self, site: Site) -> bool {
        !self.bricks.iter().any(|b| b.sites().contains(site))
    }

    /// The [`weight`](Brick::weight) of the brick at `site`, if exactly one brick sits there and gives one.
    pub fn weight(&self, site: Site) -> Option<&'a dyn Any> {
        self.only(site)?.weight(site)
    }

    /// The [`low_rank`](Brick::low_rank) update of the brick at `site`, if exactly one brick sits there and gives one.
    pub fn low_rank(&self, site: Site) -> Option<LowRank> {
        self.only(site)?.low_rank(site, self)
    }

    /// The brick at `site`, if exactly one sits there.
    fn only(&self, site: Site) -> Option<&'a dyn Brick> {
        let mut here = self.bricks.iter().filter(|b| b.sites().contains(site));
        here.next().filter(|_| here.next().is_none()).copied()
    }

    /// Passes `x: [batch, tokens, d_in]` through `site`: the bricks there from the top down, then `wiring`.
    pub fn at(&mut self, site: Site, x: Tensor<3>, wiring: &mut Base<'_>) -> Tensor<3> {
        descend(self.bricks, site, x, wiring, self)
    }

    /// The state of type `T`, made with its default on first use.
    pub fn state<T: Default + 'static>(&mut self) -> &mut T {
        slot(&mut self.state)
    }

    /// What a wiring keeps of the bricks in force, so that it need not ask them again: made with its default on first use, gone when others
    /// take their place.
    pub fn of_bricks<T: Default + 'static>(&mut self) -> &mut T {
        slot(&mut self.made)
    }

    /// The state of type `T`, if something put it there.
    pub fn get<T: 'static>(&self) -> Option<&T> {
        self.state.get(&TypeId::of::<T>())?.downcast_ref()
    }

    /// The state of type `T`, mutable, if something put it there.
    pub fn get_mut<T: 'static>(&mut self) -> Option<&mut T> {
        self.state.get_mut(&TypeId::of::<T>())?.downcast_mut()
    }

    /// Puts `value` into the run, in place of an earlier one of the same type.
    pub fn insert<T: 'static>(&mut self, value: T) {
        self.state.insert(TypeId::of::<T>(), Box::new(value));
    }

    /// Takes the state of type `T` out of the run.
    pub fn take<T: 'static>(&mut self) -> Option<T> {
        self.state.remove(&TypeId::of::<T>())?.downcast().ok().map(|b| *b)
    }

    /// Adds an auxiliary loss `[1]` (balance, sparsity, ...), already weighted.
    pub fn add_loss(&mut self, name: impl Into<String>, loss: Tensor<1>) {
        self.losses.push((name.into(), loss));
    }

    /// The auxiliary losses added so far, by name.
    pub fn losses(&self) -> &[(String, Tensor<1>)] {
        &self.losses
    }

    /// The sum `[1]` of the auxiliary losses, or `None` if there is none.
    pub fn total_loss(&self) -> Option<Tensor<1>> {
        self.losses.iter().map(|(_, l)| l.clone()).reduce(|a, b| a + b)
    }
}

/// The value of type `T` in `slots`, made with its default if there is none.
fn slot<T: Default + 'static>(slots: &mut HashMap<TypeId, Box<dyn Any>>) -> &mut T {
    let slot = slots.entry(TypeId::of::<T>()).or_insert_with(|| Box::new(T::default()));
    slot.downcast_mut().expect("a slot holds the type it is filed under")
}

fn descend(
    bricks: &[&dyn Brick],
    site: Site,
    x: Tensor<3>,
    wiring: &mut Base<'_>,
    run: &mut Run<'_>,
) -> Tensor<3> {
    match bricks.iter().rposition(|b| b.sites().contains(site)) {
        None => wiring(x, run),
        Some(top) => {
            let below = &bricks[..top];
            bricks[top].at(site, x, &mut |x, run: &mut Run<'_>| descend(below, site, x, wiring, run), run)
        }
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;

    use super::*;
    use crate::{Part, SiteSet, Skip};

    #[test]
    fn sites_without_a_brick_are_bare() {
        let (here, there) = (Site::layer(1, Part::Block), Site::layer(2, Part::Block));
        assert!(Run::default().is_bare(here));
        let skip = Skip { sites: SiteSet::from_iter([here]) };
        let bricks: [&dyn Brick; 1] = [&skip];
        let run = Run::new(&bricks);
        assert!(!run.is_bare(here) && run.is_bare(there));
        assert_eq!(run.bricks().len(), 1);
    }

    #[test]
    fn the_weight_of_a_brick_is_given_where_it_sits_alone() {
        struct Half(SiteSet);
        impl Brick for Half {
            fn sites(&self) -> &SiteSet {
                &self.0
            }
            fn at(&self, _: Site, x: Tensor<3>, _: &mut Base<'_>, _: &mut Run<'_>) -> Tensor<3> {
                x * 0.5
            }
            fn weight(&self, _: Site) -> Option<&dyn Any> {
                Some(&0.5f32)
            }
            fn low_rank(&self, _: Site, run: &Run<'_>) -> Option<LowRank> {
                let [a, b] = [Tensor::ones([3, 1], &Device::flex()), Tensor::ones([1, 2], &Device::flex())];
                (run.mode == Mode::Infer).then_some(LowRank { a, b, scale: 2.0 })
            }
        }
        let [alone, shared] = [1, 2].map(|l| Site::layer(l, Part::MlpUp));
        let half = Half(SiteSet::from_iter([alone, shared]));
        let skip = Skip { sites: SiteSet::from_iter([shared, Site::global(Part::Head)]) };
        let bricks: [&dyn Brick; 2] = [&half, &skip];
        let mut run = Run::new(&bricks);
        let scales =
            |run: &Run<'_>| [alone, shared].map(|site| run.low_rank(site).map(|update| update.scale));
        assert_eq!(scales(&run), [Some(2.0), None]);
        run.mode = Mode::Train;
        assert_eq!(scales(&run), [None, None], "it depends on the run");
        let of = |site| run.weight(site).and_then(|w| w.downcast_ref::<f32>());
        assert_eq!(of(alone), Some(&0.5));
        assert_eq!(of(shared), None, "another brick is there too");
        assert_eq!(of(Site::global(Part::Head)), None, "a brick that gives none");
        assert_eq!(of(Site::global(Part::Norm)), None, "no brick");
    }

    #[test]
    fn a_pass_goes_on_with_other_bricks() {
        let skip = Skip { sites: SiteSet::from_iter([Site::layer(1, Part::Block)]) };
        let bricks: [&dyn Brick; 1] = [&skip];
        let mut run = Run::new(&bricks);
        run.insert(3u32);
        *run.of_bricks::<u32>() = 4;
        (run.mode, run.seed) = (Mode::Train, Seed(5));
        run.add_loss("z", Tensor::from_floats([0.5], &Device::flex()));
        let mut run = run.with_bricks(&[]);
        assert_eq!(*run.of_bricks::<u32>(), 0, "what was made of the others is gone");
        assert!(run.is_bare(Site::layer(1, Part::Block)));
        assert_eq!((run.get::<u32>(), run.mode, run.seed), (Some(&3), Mode::Train, Seed(5)));
        assert_eq!(run.losses().len(), 1);
    }

    #[test]
    fn state_is_kept_by_type() {
        let mut run = Run::default();
        assert_eq!(run.get::<u32>(), None);
        run.insert(3u32);
        run.insert(7u32);
        run.insert("text");
        *run.get_mut::<u32>().unwrap() += 1;
        assert_eq!((run.get::<u32>(), run.get::<&str>(), run.get::<u64>()), (Some(&8), Some(&"text"), None));
        assert_eq!(run.take::<u32>(), Some(8));
        assert_eq!((run.take::<u32>(), run.get::<&str>()), (None, Some(&"text")));
        *run.state::<u32>() += 5;
        assert_eq!(run.get::<u32>(), Some(&5), "begins with the default");
    }

    #[test]
    fn losses_are_kept_by_name_and_summed() {
        let device = Device::flex();
        let mut run = Run::default();
        assert!(run.total_loss().is_none());
        for (name, loss) in [("balance", 0.5), ("sparsity", 0.25)] {
            run.add_loss(name, Tensor::from_floats([loss], &device));
        }
        let names: Vec<&str> = run.losses().iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["balance", "sparsity"]);
        let total = run.total_loss().map(|loss| loss.into_scalar::<f32>());
        assert_eq!(total, Some(0.75));
    }
}
