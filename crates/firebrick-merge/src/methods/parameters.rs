//! The methods by mergekit's names, and their parameters.

use std::str::FromStr;

/// A merge method, by mergekit's name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum MergeMethod {
    /// Weighted mean of the models (arXiv 2203.05482).
    Linear,
    /// Along the great circle between two models, each taken as one vector per tensor.
    Slerp,
    /// The same by weights, on models or on task vectors, per tensor, row or column.
    Nuslerp,
    /// One model as it is, or scaled.
    Passthrough,
    /// Between base and mean, by the angle between task vectors (arXiv 2403.19522).
    ModelStock,
    /// The base with the elements of another model that change it most.
    ArceeFusion,
    /// The Riemannian centre of mass of the directions of several models.
    Karcher,
    /// Base plus the weighted sum of what each model adds to it (arXiv 2212.04089).
    TaskArithmetic,
    /// Task vectors trimmed, and merged where they agree in sign (arXiv 2306.01708).
    Ties,
    /// Randomly dropped task vectors (arXiv 2311.03099), merged where they agree in sign.
    DareTies,
    /// Randomly dropped task vectors (arXiv 2311.03099), summed.
    DareLinear,
    /// Task vectors without their smallest and largest elements (arXiv 2312.06795), summed.
    Breadcrumbs,
    /// Task vectors without their smallest and largest elements, merged where they agree in sign.
    BreadcrumbsTies,
    /// Task vectors dropped at random by rank (arXiv 2406.11617), merged where they agree in sign.
    Della,
    /// Task vectors dropped at random by rank (arXiv 2406.11617), summed.
    DellaLinear,
    /// Spherical mean of several models in the tangent space at their mean direction.
    Multislerp,
    /// Elements that vary most between models, weighted by their energy (arXiv 2408.07990).
    Sce,
    /// Task vectors averaged where several are active, kept whole where one is.
    Ram,
    /// The same, with what is one model's alone scaled up.
    RamplusTl,
    /// The base moved by a constant amount towards another model.
    Nearswap,
}

/// A parameter of a method, by mergekit's name. Switches are 0 and 1.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Parameter {
    /// Its name.
    pub name: &'static str,
    /// Looked up for each model; else once for all.
    pub per_model: bool,
    /// Its value where none is given; `None` if one has to be. The base never has to.
    pub default: Option<f64>,
}

const fn own(name: &'static str, default: f64) -> Parameter {
    Parameter { name, per_model: true, default: Some(default) }
}

const fn global(name: &'static str, default: f64) -> Parameter {
    Parameter { name, per_model: false, default: Some(default) }
}

const WEIGHT: Parameter = Parameter { name: "weight", per_model: true, default: None };
const T: Parameter = Parameter { name: "t", per_model: false, default: None };
const DENSITY: Parameter = own("density", 1.0);
const GAMMA: Parameter = own("gamma", 0.01);
const EPSILON: Parameter = own("epsilon", 0.15);
const LAMBDA: Parameter = global("lambda", 1.0);
/// How masks are stored in mergekit: without effect on the result.
const INT8_MASK: Parameter = global("int8_mask", 0.0);

const fn normalize(default: f64) -> Parameter {
    global("normalize", default)
}

const fn rescale(default: f64) -> Parameter {
    global("rescale", default)
}

const fn trimmed(normalized: f64, rescaled: f64) -> [Parameter; 6] {
    [WEIGHT, DENSITY, normalize(normalized), rescale(rescaled), LAMBDA, INT8_MASK]
}

const fn trimmed_by(extra: Parameter, normalized: f64, rescaled: f64) -> [Parameter; 7] {
    [WEIGHT, DENSITY, extra, normalize(normalized), rescale(rescaled), LAMBDA, INT8_MASK]
}

/// Every method with what a merge by it is called, and its parameters.
const METHODS: [(MergeMethod, &str, &[Parameter]); 20] = [
    (MergeMethod::Linear, "merge linear", &[WEIGHT, normalize(1.0)]),
    (MergeMethod::Slerp, "merge slerp", &[T]),
    (
        MergeMethod::Nuslerp,
        "merge nuslerp",
        &[WEIGHT, global("nuslerp_flatten", 1.0), global("nuslerp_row_wise", 0.0)],
    ),
    (MergeMethod::Passthrough, "merge passthrough", &[own("scale", 1.0)]),
    (MergeMethod::ModelStock, "merge model_stock", &[global("filter_wise", 0.0)]),
    (MergeMethod::ArceeFusion, "merge arcee_fusion", &[]),
    (MergeMethod::Karcher, "merge karcher", &[global("max_iter", 10.0), global("tol", 1e-5)]),
    (MergeMethod::TaskArithmetic, "merge task_arithmetic", &trimmed(0.0, 0.0)),
    (MergeMethod::Ties, "merge ties", &trimmed(1.0, 0.0)),
    (MergeMethod::DareTies, "merge dare_ties", &trimmed(0.0, 1.0)),
    (MergeMethod::DareLinear, "merge dare_linear", &trimmed(0.0, 1.0)),
    (MergeMethod::Breadcrumbs, "merge breadcrumbs", &trimmed_by(GAMMA, 0.0, 0.0)),
    (MergeMethod::BreadcrumbsTies, "merge breadcrumbs_ties", &trimmed_by(GAMMA, 0.0, 0.0)),
    (MergeMethod::Della, "merge della", &trimmed_by(EPSILON, 1.0, 1.0)),
    (MergeMethod::DellaLinear, "merge della_linear", &trimmed_by(EPSILON, 0.0, 1.0)),
    (
        MergeMethod::Multislerp,
        "merge multislerp",
        &[WEIGHT, global("normalize_weights", 1.0), global("eps", 1e-8)],
    ),
    (MergeMethod::Sce, "merge sce", &[global("select_topk", 1.0), INT8_MASK]),
    (MergeMethod::Ram, "merge ram", &[global("epsilon", 1e-5)]),
    (
        MergeMethod::RamplusTl,
        "merge ramplus_tl",
        &[global("epsilon", 1e-5), global("r", 0.1), global("alpha", 0.2)],
    ),
    (MergeMethod::Nearswap, "merge nearswap", &[T]),
];

impl MergeMethod {
    /// Every method.
    pub fn all() -> impl Iterator<Item = MergeMethod> {
        METHODS.iter().map(|(method, ..)| *method)
    }

    fn entry(self) -> &'static (MergeMethod, &'static str, &'static [Parameter]) {
        METHODS.iter().find(|(method, ..)| *method == self).unwrap_or(&METHODS[0])
    }

    /// mergekit's name.
    pub fn name(self) -> &'static str {
        self.label().trim_start_matches("merge ")
    }

    /// What a merge by it is called.
    pub(crate) fn label(self) -> &'static str {
        self.entry().1
    }

    /// Its parameters.
    pub fn parameters(self) -> &'static [Parameter] {
        self.entry().2
    }

    /// Whether one of the models has to be the base. `nuslerp` and `multislerp` work on task vectors if there is one.
    pub fn needs_base(self) -> bool {
        use MergeMethod::{Karcher, Linear, Multislerp, Nuslerp, Passthrough};
        !matches!(self, Linear | Passthrough | Karcher | Nuslerp | Multislerp)
    }

    /// Whether any range of a tensor can be merged alone; other methods see the whole tensor before they begin.
    pub fn elementwise(self) -> bool {
        use MergeMethod::{Linear, Nearswap, Passthrough, Ram, TaskArithmetic};
        matches!(self, Linear | TaskArithmetic | Nearswap | Passthrough | Ram)
    }

    /// The fewest and the most models; the base counts, but for `nuslerp`.
    pub fn models(self) -> (usize, usize) {
        match self {
            MergeMethod::Passthrough => (1, 1),
            MergeMethod::Slerp => (1, 2),
            MergeMethod::Nuslerp | MergeMethod::ArceeFusion | MergeMethod::Nearswap => (2, 2),
            MergeMethod::ModelStock => (3, usize::MAX),
            _ => (1, usize::MAX),
        }
    }

    /// Bytes that a merge of a tensor of `elements` allocates at most. `rounded` says whether every intermediate result is rounded, see
    /// [`Numerics::Mergekit`](super::Numerics::Mergekit): then methods that know angles hold whole vectors in f32.
    pub fn scratch_bytes(self, elements: usize, models: usize, rounded: bool) -> u64 {
        let pieces = (8 * 4 * super::values::PIECE * (models + 2)) as u64;
        let (elements, models) = (elements as u64, models as u64);
        let tables = 8 * (1 << 17) * (models + 1);
        // Of each model the vector, its unit vector and its tangent; beside them base, centre, one tangent more and the result.
        let vectors = 4 * elements * (3 * models + 4);
        pieces
            + match self {
                _ if self.elementwise() => 0,
                MergeMethod::Karcher
                | MergeMethod::Nuslerp
                | MergeMethod::Multislerp
                | MergeMethod::ModelStock
                    if rounded =>
                {
                    4 * tables + vectors
                }
                MergeMethod::DareTies | MergeMethod::DareLinear => 0,
                MergeMethod::Della | MergeMethod::DellaLinear => models * elements / 4,
                _ => 4 * tables,
            }
    }
}

impl FromStr for MergeMethod {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::all().find(|method| method.name() == text).ok_or_else(|| {
            let names: Vec<&str> = Self::all().map(MergeMethod::name).collect();
            format!("merge_method `{text}` is not one of {}", names.join(", "))
        })
    }
}

/// The values of `names`, in their order: from `value` by name, else the default; every problem in one text.
fn look_up<const N: usize>(
    method: MergeMethod,
    per_model: bool,
    names: [&str; N],
    value: impl Fn(&str) -> Option<f64>,
) -> Result<[f64; N], String> {
    let mut problems = Vec::new();
    let values = names.map(|name| {
        let known = method.parameters().iter().find(|p| p.name == name && p.per_model == per_model);
        match known.map(|p| value(name).or(p.default)) {
            None => 0.0,
            Some(Some(v)) if v.is_finite() => v,
            Some(Some(v)) => {
                problems.push(format!("`{name}` is {v}"));
                0.0
            }
            Some(None) => {
                problems.push(format!("`{name}` is missing"));
                0.0
            }
        }
    });
    if problems.is_empty() { Ok(values) } else { Err(format!("{}: {}", method.name(), problems.join("; "))) }
}

/// The parameters of one model at one tensor; those that its method does not have are without effect.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ModelParameters {
    /// Its share.
    pub weight: f64,
    /// Share of the task vector that is kept.
    pub density: f64,
    /// Share of its largest elements that breadcrumbs drop.
    pub gamma: f64,
    /// Half of the range of keep probabilities in della.
    pub epsilon: f64,
    /// Factor of passthrough.
    pub scale: f64,
}

impl Default for ModelParameters {
    /// Those of a base.
    fn default() -> Self {
        ModelParameters { weight: 0.0, density: 1.0, gamma: 0.01, epsilon: 0.15, scale: 1.0 }
    }
}

impl ModelParameters {
    /// From `value` by mergekit's names, else the defaults of `method`.
    ///
    /// # Errors
    /// Lists what is missing or not finite.
    pub fn new(method: MergeMethod, value: impl Fn(&str) -> Option<f64>) -> Result<Self, String> {
        let names = ["weight", "density", "gamma", "epsilon", "scale"];
        let [weight, density, gamma, epsilon, scale] = look_up(method, true, names, value)?;
        Ok(ModelParameters { weight, density, gamma, epsilon, scale })
    }
}

/// The parameters of a merge at one tensor; those that its method does not have are without effect.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct GlobalParameters {
    /// Divide by the sum of weights.
    pub normalize: bool,
    /// Give sparse task vectors the L1 norm that they had.
    pub rescale: bool,
    /// Factor of the merged task vector.
    pub lambda: f64,
    /// Place between two models; distance in `nearswap`.
    pub t: f64,
    /// `nuslerp`: the whole tensor is one vector.
    pub nuslerp_flatten: bool,
    /// `nuslerp`, not flattened: the vectors lie along the first axis and not along the last (so it is in mergekit, despite the name).
    pub nuslerp_row_wise: bool,
    /// `model_stock`: one angle for each row.
    pub filter_wise: bool,
    /// `karcher`: most steps.
    pub max_iter: f64,
    /// `karcher`: shortest step, and smallest norm that counts.
    pub tol: f64,
    /// `multislerp`: weights are divided by their sum.
    pub normalize_weights: bool,
    /// `multislerp`: smallest norm.
    pub eps: f64,
    /// `sce`: share of the varying positions that are kept.
    pub select_topk: f64,
    /// `ram`: what counts as no change.
    pub epsilon: f64,
    /// `ramplus_tl`: gain per overlap.
    pub r: f64,
    /// `ramplus_tl`: most overlap that counts.
    pub alpha: f64,
}

impl GlobalParameters {
    /// From `value` by mergekit's names, else the defaults of `method`.
    ///
    /// # Errors
    /// Lists what is missing or not finite.
    pub fn new(method: MergeMethod, value: impl Fn(&str) -> Option<f64>) -> Result<Self, String> {
        let names = [
            "normalize",
            "rescale",
            "lambda",
            "t",
            "nuslerp_flatten",
            "nuslerp_row_wise",
            "filter_wise",
            "max_iter",
            "tol",
            "normalize_weights",
            "eps",
            "select_topk",
            "epsilon",
            "r",
            "alpha",
        ];
        let v = look_up(method, false, names, value)?;
        Ok(GlobalParameters {
            normalize: v[0] != 0.0,
            rescale: v[1] != 0.0,
            lambda: v[2],
            t: v[3],
            nuslerp_flatten: v[4] != 0.0,
            nuslerp_row_wise: v[5] != 0.0,
            filter_wise: v[6] != 0.0,
            max_iter: v[7],
            tol: v[8],
            normalize_weights: v[9] != 0.0,
            eps: v[10],
            select_topk: v[11],
            epsilon: v[12],
            r: v[13],
            alpha: v[14],
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn methods_have_mergekits_names() {
        assert_eq!(MergeMethod::all().count(), 20);
        for method in MergeMethod::all() {
            assert_eq!(method.name().parse(), Ok(method));
        }
        let error = "lineer".parse::<MergeMethod>().unwrap_err();
        assert!(error.contains("`lineer`") && error.contains("nearswap"), "{error}");
    }

    #[test]
    fn parameters_come_from_names_or_defaults() {
        let own = |value: fn(&str) -> Option<f64>| ModelParameters::new(MergeMethod::Breadcrumbs, value);
        let given = own(|name| (name == "weight").then_some(0.3)).unwrap();
        assert_eq!((given.weight, given.density, given.gamma), (0.3, 1.0, 0.01));
        let missing = own(|_| None).unwrap_err();
        assert!(missing.contains("breadcrumbs") && missing.contains("`weight` is missing"), "{missing}");
        assert!(own(|_| Some(f64::NAN)).unwrap_err().contains("`gamma` is NaN"));
        let ties = GlobalParameters::new(MergeMethod::Ties, |_| None).unwrap();
        assert!(ties.normalize && !ties.rescale && ties.lambda == 1.0);
        let dare = GlobalParameters::new(MergeMethod::DareTies, |_| None).unwrap();
        assert!(!dare.normalize && dare.rescale);
        assert!(GlobalParameters::new(MergeMethod::Slerp, |_| None).unwrap_err().contains("`t` is missing"));
        // `t` is nothing to a method that has none.
        assert_eq!(
            GlobalParameters::new(MergeMethod::Ties, |n| (n == "t").then_some(f64::NAN)).unwrap().t,
            0.0
        );
    }
}
