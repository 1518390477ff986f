//! The one idea: what sits at sites and changes or observes what flows through.

use std::any::Any;

use burn::tensor::Tensor;

use crate::{Run, Site, SiteSet};

/// The site as it is below a brick: call it once, twice or never.
///
/// Takes the site's input `[batch, tokens, d_in]` and returns its output `[batch, tokens, d_out]`.
pub type Base<'a> = dyn FnMut(Tensor<3>, &mut Run<'_>) -> Tensor<3> + 'a;

/// Something that sits at sites of a wiring and changes or observes what flows through them.
///
/// Bricks stack: the last one of [`Run::bricks`] is called first, and its `base` is the brick below it, down to the
/// wiring itself. A brick that trains is also a burn `Module`, so that an optimizer can step it while the wiring stays frozen.
///
/// ```
/// use burn::tensor::{Device, Tensor};
/// use firebrick_core::{Base, Brick, Part, Run, Site, SiteSet};
///
/// /// Scales what a site returns.
/// struct Scale { sites: SiteSet, factor: f32 }
///
/// impl Brick for Scale {
///     fn sites(&self) -> &SiteSet { &self.sites }
///     fn at(&self, _: Site, x: Tensor<3>, base: &mut Base<'_>, run: &mut Run<'_>) -> Tensor<3> {
///         base(x, run) * self.factor
///     }
/// }
///
/// let site = Site::layer(0, Part::Mlp);
/// let scale = Scale { sites: [site].into_iter().collect(), factor: 3.0 };
/// let bricks: [&dyn Brick; 1] = [&scale];
/// let mut run = Run::new(&bricks);
/// let x = Tensor::<3>::ones([1, 2, 4], &Device::flex());
/// let y = run.at(site, x, &mut |x, _| x * 2.0);
/// assert_eq!(y.sum().into_scalar::<f32>(), 8.0 * 6.0);
/// ```
pub trait Brick {
    /// The sites this brick sits at.
    fn sites(&self) -> &SiteSet;

    /// What happens at `site`: `x` is the site's input `[batch, tokens, d_in]`, `base` the site below this brick.
    fn at(&self, site: Site, x: Tensor<3>, base: &mut Base<'_>, run: &mut Run<'_>) -> Tensor<3>;

    /// The weight with which this brick multiplies at `site`, if it does that and no more, without a look at what lies below. A wiring
    /// that knows the type of the weight may do it in its place, together with other sites.
    fn weight(&self, _site: Site) -> Option<&dyn Any> {
        None
    }

    /// What this brick adds to the weight below it at `site` in this run, if it does that and no more. A wiring may add it in the brick's
    /// place, in one pass with its own product.
    fn low_rank(&self, _site: Site, _run: &Run<'_>) -> Option<LowRank> {
        None
    }
}

/// An update `scale a b` of a weight (LoRA).
#[derive(Clone, Debug)]
pub struct LowRank {
    /// `[d_in, rank]`.
    pub a: Tensor<2>,
    /// `[rank, d_out]`.
    pub b: Tensor<2>,
    /// Factor of the product.
    pub scale: f64,
}

/// Leaves its sites out: the output is the input, and what lies below is never called.
///
/// Meaningful where input and output are the residual stream: `block`, `attn_sublayer`, `mlp_sublayer` (LLM-Drop).
#[derive(Clone, Debug, Default)]
pub struct Skip {
    /// The residual sites to leave out.
    pub sites: SiteSet,
}

impl Brick for Skip {
    fn sites(&self) -> &SiteSet {
        &self.sites
    }

    fn at(&self, _site: Site, x: Tensor<3>, _base: &mut Base<'_>, _run: &mut Run<'_>) -> Tensor<3> {
        x
    }
}

/// Records input and output of its sites in the run, as [`Taps`].
#[derive(Clone, Debug, Default)]
pub struct Tap {
    /// The sites to record.
    pub sites: SiteSet,
}

/// What [`Tap`] bricks recorded during one forward pass, in the order the sites were passed.
#[derive(Debug, Default)]
pub struct Taps {
    /// Site, its input `[batch, tokens, d_in]` and its output `[batch, tokens, d_out]`.
    pub seen: Vec<(Site, Tensor<3>, Tensor<3>)>,
}

impl Brick for Tap {
    fn sites(&self) -> &SiteSet {
        &self.sites
    }

    fn at(&self, site: Site, x: Tensor<3>, base: &mut Base<'_>, run: &mut Run<'_>) -> Tensor<3> {
        let y = base(x.clone(), run);
        run.state::<Taps>().seen.push((site, x, y.clone()));
        y
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Part;
    use burn::tensor::Device;

    struct Add(SiteSet, f32);
    impl Brick for Add {
        fn sites(&self) -> &SiteSet {
            &self.0
        }
        fn at(&self, _: Site, x: Tensor<3>, base: &mut Base<'_>, run: &mut Run<'_>) -> Tensor<3> {
            base(x, run) + self.1
        }
    }
    struct Twice(SiteSet);
    impl Brick for Twice {
        fn sites(&self) -> &SiteSet {
            &self.0
        }
        fn at(&self, _: Site, x: Tensor<3>, base: &mut Base<'_>, run: &mut Run<'_>) -> Tensor<3> {
            let once = base(x, run);
            base(once, run)
        }
    }

    fn value(bricks: &[&dyn Brick], site: Site) -> f32 {
        let x = Tensor::<3>::ones([1, 1, 1], &Device::flex());
        Run::new(bricks).at(site, x, &mut |x, _| x * 10.0).into_scalar()
    }

    #[test]
    fn bricks_stack_in_order_and_only_at_their_sites() {
        let site = Site::layer(1, Part::Mlp);
        let here: SiteSet = [site].into_iter().collect();
        let (add, twice) = (Add(here.clone(), 1.0), Twice(here.clone()));
        assert_eq!(value(&[], site), 10.0);
        assert_eq!(value(&[&add], site), 11.0);
        assert_eq!(value(&[&add, &twice], site), 111.0, "twice on top runs the added base twice");
        assert_eq!(value(&[&twice, &add], site), 101.0, "the order of the stack matters");
        assert_eq!(value(&[&add, &twice], Site::layer(2, Part::Mlp)), 10.0);
        assert_eq!(value(&[&add, &Skip { sites: here }], site), 1.0);
    }

    #[test]
    fn taps_record_in_order() {
        let sites: SiteSet = [Site::layer(0, Part::Mlp), Site::layer(1, Part::Mlp)].into_iter().collect();
        let tap = Tap { sites: sites.clone() };
        let bricks: [&dyn Brick; 1] = [&tap];
        let mut run = Run::new(&bricks);
        let mut x = Tensor::<3>::ones([1, 1, 1], &Device::flex());
        for site in sites.iter() {
            x = run.at(site, x, &mut |x, _| x * 2.0);
        }
        let outputs: Vec<f32> =
            run.state::<Taps>().seen.iter().map(|(_, _, y)| y.clone().into_scalar()).collect();
        assert_eq!(outputs, [2.0, 4.0]);
    }
}
