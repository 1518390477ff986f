//! The methods on tensors in memory: known values, identities with controls, random methods, edges.

use firebrick_core::Seed;
use firebrick_merge::{
    GlobalParameters, MergeMethod, ModelParameters, Numerics, TensorMerge, Values, merge_tensor,
};
use firebrick_tensor::block::DType;

const B: [f32; 8] = [0.1, -0.2, 0.3, -0.4, 0.5, -0.6, 0.7, -0.8];
const DELTAS: [[f32; 8]; 3] = [
    [0.050, -0.031, -0.101, 0.0, 0.402, 0.0, -0.063, 0.117],
    [-0.047, 0.099, 0.022, -0.203, 0.0, 0.053, 0.251, -0.071],
    [0.021, -0.012, 0.207, 0.103, 0.0, 0.0, 0.008, 0.197],
];

fn tuned() -> Vec<Vec<f32>> {
    DELTAS.iter().map(|d| B.iter().zip(d).map(|(b, d)| b + d).collect()).collect()
}

/// A merge with everything at its default but what is given.
struct Case<'a> {
    method: MergeMethod,
    inputs: Vec<&'a [f32]>,
    base: Option<usize>,
    shape: Vec<usize>,
    weights: Vec<f64>,
    own: Vec<(&'a str, f64)>,
    all: Vec<(&'a str, f64)>,
    seed: u64,
    masks: Option<Vec<&'a [bool]>>,
}

impl<'a> Case<'a> {
    fn new(method: &str, inputs: &[&'a [f32]], base: Option<usize>, weights: &[f64]) -> Self {
        Case {
            method: method.parse().unwrap(),
            inputs: inputs.to_vec(),
            base,
            shape: vec![inputs.first().map_or(0, |x| x.len())],
            weights: weights.to_vec(),
            own: Vec::new(),
            all: Vec::new(),
            seed: 0,
            masks: None,
        }
    }

    fn own(mut self, name: &'a str, value: f64) -> Self {
        self.own.push((name, value));
        self
    }

    fn all(mut self, name: &'a str, value: f64) -> Self {
        self.all.push((name, value));
        self
    }

    fn shape(mut self, shape: &[usize]) -> Self {
        self.shape = shape.to_vec();
        self
    }

    fn seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }

    fn masks(mut self, masks: &'a [Vec<bool>]) -> Self {
        self.masks = Some(masks.iter().map(|m| &m[..]).collect());
        self
    }

    fn run(&self) -> Result<Vec<f32>, String> {
        let find = |list: &[(&str, f64)], name: &str| list.iter().find(|(n, _)| *n == name).map(|(_, v)| *v);
        let global = GlobalParameters::new(self.method, |name| find(&self.all, name))?;
        let others = (0..self.inputs.len()).filter(|i| Some(*i) != self.base);
        let mut per_model = vec![ModelParameters::default(); self.inputs.len()];
        for (i, weight) in others.zip(self.weights.iter().chain(std::iter::repeat(&1.0))) {
            let value = |name: &str| if name == "weight" { Some(*weight) } else { find(&self.own, name) };
            per_model[i] = ModelParameters::new(self.method, value)?;
        }
        let inputs: Vec<Values<'_>> = self.inputs.iter().map(|x| Values::from(*x)).collect();
        let tensor = TensorMerge {
            inputs: &inputs,
            base: self.base,
            shape: &self.shape,
            per_model: &per_model,
            global: &global,
            seed: Seed(self.seed),
            numerics: Numerics::F32,
            dtype: DType::F32,
            masks: self.masks.as_deref(),
        };
        merge_tensor(self.method, &tensor)
    }

    fn get(&self) -> Vec<f32> {
        self.run().unwrap()
    }
}

fn largest(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter()
        .zip(b)
        .map(|(a, b)| if a.is_finite() { (a - b).abs() } else { f32::INFINITY })
        .fold(0.0, f32::max)
}

fn bits(v: &[f32]) -> Vec<u32> {
    v.iter().map(|v| v.to_bits()).collect()
}

/// Values from the formulas in f64, and of mergekit 0.1.5 where it computes them.
#[test]
fn known_values() {
    let x = tuned();
    let (x1, x2, x3) = (&x[0][..], &x[1][..], &x[2][..]);
    let all = [&B[..], x1, x2, x3];
    let w = [0.5, 0.3, 0.4];
    let task = |method| Case::new(method, &all, Some(0), &w);
    let masks = ["10110110", "01101101", "11011010"].map(|m| m.chars().map(|c| c == '1').collect::<Vec<_>>());
    let known: [(Case<'_>, [f32; 8]); 18] = [
        (
            Case::new("linear", &[x1, x2], None, &[0.5, 0.3]),
            [0.113625, -0.182250, 0.245125, -0.476125, 0.751250, -0.580125, 0.754750, -0.753500],
        ),
        (
            Case::new("slerp", &[x1, x2], Some(0), &[]).all("t", 0.3),
            [0.122611, -0.194768, 0.239901, -0.468639, 0.792934, -0.593248, 0.743460, -0.751522],
        ),
        (
            Case::new("nuslerp", &[x1, x2, &B], Some(2), &[0.6, 0.4]),
            [0.113388, -0.161730, 0.224333, -0.535325, 0.859544, -0.564669, 0.810977, -0.742687],
        ),
        (
            task("task_arithmetic").all("lambda", 0.7),
            [0.113510, -0.193420, 0.327230, -0.413790, 0.640700, -0.588870, 0.732900, -0.718800],
        ),
        (
            task("ties").own("density", 0.5),
            [0.121000, -0.101000, 0.507000, -0.603000, 0.902000, -0.600000, 0.951000, -0.647444],
        ),
        (
            task("ties").own("density", 0.5).all("normalize", 0.0),
            [0.108400, -0.170300, 0.382800, -0.460900, 0.701000, -0.600000, 0.775300, -0.662700],
        ),
        (
            task("ties").own("density", 0.5).all("rescale", 1.0),
            [0.121795, -0.081644, 0.514841, -0.642689, 0.949675, -0.600000, 1.000074, -0.636419],
        ),
        (
            task("breadcrumbs").own("density", 0.5).own("gamma", 0.125),
            [0.133400, -0.175100, 0.249500, -0.419700, 0.500000, -0.584100, 0.668500, -0.684000],
        ),
        (
            task("dare_linear").own("density", 0.5).masks(&masks),
            [0.221219, -0.127833, 0.139807, -0.243211, 0.500000, -0.551586, 0.599720, -0.864856],
        ),
        (
            task("model_stock"),
            [0.094598, -0.212605, 0.271190, -0.377492, 0.409517, -0.611929, 0.655884, -0.854695],
        ),
        (
            task("sce").all("select_topk", 0.5),
            [0.100000, -0.200000, 0.384583, -0.603000, 0.902000, -0.600000, 0.868797, -0.800000],
        ),
        (
            Case::new("karcher", &[x1, x2, x3], None, &[]),
            [0.112663, -0.189188, 0.358145, -0.435519, 0.649037, -0.599106, 0.778700, -0.729847],
        ),
        (
            Case::new("multislerp", &[x1, x2, x3], None, &[0.5, 0.3, 0.2]),
            [0.119415, -0.195263, 0.309016, -0.444239, 0.717990, -0.599572, 0.758277, -0.735121],
        ),
        (
            Case::new("multislerp", &all, Some(0), &[0.5, 0.3, 0.2]),
            [0.122098, -0.170536, 0.328424, -0.475457, 0.828928, -0.567617, 0.805585, -0.654741],
        ),
        (
            Case::new("nearswap", &[&B, x1], Some(0), &[]).all("t", 0.05),
            [0.150000, -0.231000, 0.250000, -0.400000, 0.550000, -0.600000, 0.650000, -0.750000],
        ),
        (task("ram"), [0.108000, -0.181333, 0.342667, -0.450000, 0.902000, -0.547000, 0.765333, -0.719000]),
        (
            task("ramplus_tl"),
            [0.108000, -0.181333, 0.342667, -0.450000, 0.910040, -0.545940, 0.765333, -0.719000],
        ),
        (
            Case::new("arcee_fusion", &[&B, x1], Some(0), &[]).shape(&[2, 4]),
            [0.100000, -0.200000, 0.300000, -0.400000, 0.902000, -0.600000, 0.700000, -0.683000],
        ),
    ];
    for (case, expected) in known {
        let found = case.get();
        assert!(largest(&found, &expected) < 1e-5, "{}: {found:?}", case.method.name());
        // The order of the others is that of their weights: turned round, the result is another.
        let mut turned = Case { inputs: case.inputs.iter().rev().copied().collect(), ..case };
        turned.base = turned.base.map(|b| turned.inputs.len() - 1 - b);
        turned.masks = None;
        let symmetric =
            ["model_stock", "sce", "karcher", "ram", "ramplus_tl", "nearswap", "arcee_fusion", "slerp"];
        if !symmetric.contains(&turned.method.name()) && turned.inputs.len() > 2 {
            assert!(largest(&turned.get(), &expected) > 1e-4, "control: {}", turned.method.name());
        }
    }
}

#[test]
fn identical_models_and_endpoints() {
    let x = tuned();
    let (x1, x2) = (&x[0][..], &x[1][..]);
    for method in ["linear", "karcher", "multislerp"] {
        let same = Case::new(method, &[x1, x1, x1], None, &[0.5, 0.3, 0.2]).get();
        assert!(largest(&same, x1) < 3e-7, "{method}: {same:?}");
        let other = Case::new(method, &[x1, x1, x2], None, &[0.5, 0.3, 0.2]).get();
        assert!(largest(&other, x1) > 1e-2, "control: {method}");
    }
    let slerp = |a, b, t| Case::new("slerp", &[a, b], Some(0), &[]).all("t", t).get();
    assert!(largest(&slerp(x1, x1, 0.3), x1) < 1e-7);
    assert_eq!((bits(&slerp(x1, x2, 0.0)), bits(&slerp(x1, x2, 1.0))), (bits(x1), bits(x2)));
    assert!(largest(&slerp(x1, x2, 0.5), x1) > 1e-2, "control");
    // The base is where t is 0, wherever it stands.
    let reversed = Case::new("slerp", &[x2, x1], Some(1), &[]).all("t", 0.3).get();
    assert_eq!(bits(&reversed), bits(&slerp(x1, x2, 0.3)));
    for t in [0.2, 0.7] {
        let nuslerp = Case::new("nuslerp", &[x1, x2], None, &[1.0 - t, t]).get();
        assert!(largest(&nuslerp, &slerp(x1, x2, t)) < 3e-7, "nuslerp by weights is slerp");
    }
    // Almost parallel: slerp is linear, nuslerp is not.
    let near: Vec<f32> = x1.iter().map(|v| v * 1.5).collect();
    assert!(largest(&slerp(x1, &near, 0.5), &x1.iter().map(|v| v * 1.25).collect::<Vec<_>>()) < 1e-6);
    let alone = Case::new("slerp", &[x1], Some(0), &[]).all("t", 0.3).get();
    assert_eq!(bits(&alone), bits(x1));
    let signed = [-0.0, 0.0, 1.5, f32::NAN];
    let through = |scale| Case::new("passthrough", &[&signed], None, &[]).own("scale", scale).get();
    assert_eq!(bits(&through(1.0)), bits(&signed));
    assert_ne!(bits(&through(0.5)), bits(&signed), "control");
}

#[test]
fn one_task_vector_at_1_is_the_expert() {
    let x = tuned();
    let one = |method, weight: f64| Case::new(method, &[&B, &x[0]], Some(0), &[weight]);
    let methods = [
        "task_arithmetic",
        "ties",
        "dare_ties",
        "dare_linear",
        "breadcrumbs",
        "breadcrumbs_ties",
        "della",
        "della_linear",
        "multislerp",
        "ram",
    ];
    for method in methods {
        let expert = one(method, 1.0).get();
        assert!(largest(&expert, &x[0]) <= f32::EPSILON, "{method}: {expert:?}");
    }
    for method in ["task_arithmetic", "dare_ties", "breadcrumbs"] {
        assert!(largest(&one(method, 0.5).get(), &x[0]) > 0.05, "control: {method}");
    }
    let half = one("ties", 1.0).own("density", 0.5).get();
    assert!(largest(&half, &x[0]) > 0.03, "control: half of a task vector");
    let sce = Case::new("sce", &[&B, &x[0]], Some(0), &[]);
    assert!(largest(&sce.get(), &x[0]) <= f32::EPSILON);
    let none = sce.all("select_topk", 0.5).get();
    assert_eq!(none, B, "one model does not vary: nothing is selected");
    // Of identical experts, the expert.
    let stock = |a, b| Case::new("model_stock", &[&B, a, b], Some(0), &[]).get();
    assert!(largest(&stock(&x[0], &x[0]), &x[0]) < 1e-6);
    assert!(largest(&stock(&x[0], &x[1]), &x[0]) > 1e-2, "control");
    assert_eq!(stock(&B, &B), B, "task vectors of no length leave the base");
}

#[test]
fn signs_are_voted_on() {
    let base = [0.0; 4];
    // Against two of +1, one of -3 outvotes; -2 ties and counts as positive; zeros agree with nothing.
    let (a, b, c) = ([1.0, 1.0, 0.0, 1.0], [1.0, 1.0, 0.0, 0.0], [-3.0, -2.0, 0.0, -0.5]);
    let ties = |w: &[f64]| Case::new("ties", &[&base, &a, &b, &c], Some(0), w);
    assert_eq!(ties(&[1.0; 3]).get(), [-3.0, 1.0, 0.0, 1.0]);
    assert_eq!(ties(&[1.0; 3]).all("normalize", 0.0).get(), [-3.0, 2.0, 0.0, 1.0]);
    // A negative weight turns the vote, and divides as it is.
    assert_eq!(ties(&[1.0, 1.0, -1.0]).get(), [5.0, 4.0, 0.0, 1.5]);
}

#[test]
fn dare_at_density_1_is_task_arithmetic_and_injected_masks_hold() {
    let x = tuned();
    let all = [&B[..], &x[0], &x[1], &x[2]];
    let w = [0.5, 0.3, 0.4];
    let sum = Case::new("task_arithmetic", &all, Some(0), &w).get();
    for method in ["dare_linear", "della_linear", "breadcrumbs"] {
        assert_eq!(bits(&Case::new(method, &all, Some(0), &w).get()), bits(&sum), "{method}");
        let thinned = Case::new(method, &all, Some(0), &w).own("density", 0.5).get();
        assert_ne!(bits(&thinned), bits(&sum), "control: {method}");
    }
    let full = vec![vec![true; 8]; 3];
    let masked = Case::new("dare_linear", &all, Some(0), &w).own("density", 0.5).masks(&full);
    assert_eq!(bits(&masked.get()), bits(&sum));
    let none = vec![vec![false; 8]; 3];
    assert_eq!(Case::new("dare_linear", &all, Some(0), &w).own("density", 0.5).masks(&none).get(), B);
    assert!(
        Case::new("dare_linear", &all, Some(0), &w).masks(&full[..2]).run().unwrap_err().contains("mask")
    );
}

/// Task vectors of ones: what is kept can be counted, whatever it is scaled by.
#[test]
fn random_methods_keep_their_share_and_the_l1_norm() {
    let n = 200_000;
    let (base, ones) = (vec![0.0f32; n], vec![1.0f32; n]);
    for seed in 0..3 {
        for density in [0.1, 0.5, 0.9] {
            let dare = |rescale| {
                Case::new("dare_linear", &[&base, &ones], Some(0), &[1.0])
                    .own("density", density)
                    .all("rescale", rescale)
                    .seed(seed)
                    .get()
            };
            let plain = dare(0.0);
            let kept = plain.iter().filter(|v| **v != 0.0).count() as f64;
            let sigma = (n as f64 * density * (1.0 - density)).sqrt();
            assert!((kept - n as f64 * density).abs() < 3.0 * sigma, "seed {seed}: {kept} of {density}");
            let scaled = dare(1.0);
            let norm: f64 = scaled.iter().map(|v| f64::from(*v)).sum();
            assert!((norm / n as f64 - 1.0).abs() < 1e-6, "the L1 norm stays: {norm}");
            let factor = (n as f64 / kept) as f32;
            assert!(plain.iter().zip(&scaled).all(|(p, s)| *s == p * factor), "the same elements, scaled");
        }
        let draw = |seed| {
            Case::new("dare_linear", &[&base, &ones], Some(0), &[1.0]).own("density", 0.5).seed(seed).get()
        };
        assert_eq!(bits(&draw(seed)), bits(&draw(seed)));
        assert_ne!(bits(&draw(seed)), bits(&draw(seed + 1)), "control");
    }
    // Two models are thinned out independently.
    let both = Case::new("dare_linear", &[&base, &ones, &ones], Some(0), &[1.0, 1.0])
        .own("density", 0.5)
        .all("rescale", 0.0)
        .get();
    let together = both.iter().filter(|v| **v == 2.0).count() as f64;
    assert!((together - n as f64 / 4.0).abs() < 3.0 * (n as f64 * 3.0 / 16.0).sqrt(), "{together}");
}

#[test]
fn della_keeps_by_rank_in_the_row() {
    let (rows, columns) = (4000, 50);
    let base = vec![0.0f32; rows * columns];
    // In every row the magnitudes 1 to 50 in another order, and signs.
    let x: Vec<f32> = (0..rows * columns)
        .map(|i| {
            let (row, column) = (i / columns, i % columns);
            let v = ((column * 7 + row * 13) % columns + 1) as f32;
            if i % 3 == 0 { -v } else { v }
        })
        .collect();
    for seed in 0..3 {
        let merged = Case::new("della_linear", &[&base, &x], Some(0), &[1.0])
            .own("density", 0.6)
            .own("epsilon", 0.2)
            .all("rescale", 0.0)
            .shape(&[rows, columns])
            .seed(seed)
            .get();
        let mut kept = vec![0.0; columns];
        for (y, x) in merged.iter().zip(&x) {
            assert!(*y == 0.0 || y == x);
            kept[x.abs() as usize - 1] += f64::from(u8::from(*y != 0.0)) / rows as f64;
        }
        // Linear from 0.4 to 0.8; 4 sigma for each of the 50 ranks, 3 for all together.
        for (rank, kept) in kept.iter().enumerate() {
            let p = 0.4 + 0.4 * rank as f64 / (columns - 1) as f64;
            assert!(
                (kept - p).abs() < 4.0 * (p * (1.0 - p) / rows as f64).sqrt(),
                "rank {rank}: {kept} of {p}"
            );
        }
        let all = kept.iter().sum::<f64>() / columns as f64;
        assert!((all - 0.6).abs() < 3.0 * (0.24 / (rows * columns) as f64).sqrt(), "{all}");
        let slope = kept[40..].iter().sum::<f64>() - kept[..10].iter().sum::<f64>();
        assert!(slope > 2.0, "control: independent of the rank it would be 0, {slope}");
    }
    // A row of one element has no ranks: no NaN, and the density holds.
    let column = Case::new("della_linear", &[&base, &x], Some(0), &[1.0])
        .own("density", 0.6)
        .all("rescale", 0.0)
        .shape(&[rows * columns, 1])
        .get();
    let kept = column.iter().filter(|v| **v != 0.0).count() as f64 / column.len() as f64;
    assert!(column.iter().all(|v| v.is_finite()) && (kept - 0.6).abs() < 0.01, "{kept}");
}

#[test]
fn rows_and_columns() {
    let x = tuned();
    let (x1, x2) = (&x[0][..], &x[1][..]);
    let by = |row_wise, shape: &[usize]| {
        let case = Case::new("nuslerp", &[x1, x2], None, &[0.6, 0.4]).all("nuslerp_flatten", 0.0);
        case.all("nuslerp_row_wise", row_wise).shape(shape).get()
    };
    let whole = Case::new("nuslerp", &[x1, x2], None, &[0.6, 0.4]).get();
    assert!(largest(&by(0.0, &[1, 8]), &whole) < 1e-7 && largest(&by(1.0, &[8, 1]), &whole) < 1e-7);
    assert!(largest(&by(0.0, &[8]), &whole) < 1e-7, "a vector is one row");
    assert!(largest(&by(0.0, &[2, 4]), &whole) > 1e-4, "control");
    // By columns is by rows of the transposed matrix.
    let transposed = |v: &[f32]| (0..8).map(|i| v[i % 2 * 4 + i / 2]).collect::<Vec<f32>>();
    let (t1, t2) = (transposed(x1), transposed(x2));
    let rows =
        Case::new("nuslerp", &[&t1, &t2], None, &[0.6, 0.4]).all("nuslerp_flatten", 0.0).shape(&[4, 2]).get();
    assert!(largest(&transposed(&by(1.0, &[2, 4])), &rows) < 1e-7);
    let stock = |filter_wise, shape: &[usize]| {
        let case = Case::new("model_stock", &[&B, x1, x2], Some(0), &[]);
        case.all("filter_wise", filter_wise).shape(shape).get()
    };
    assert!(largest(&stock(1.0, &[1, 8]), &stock(0.0, &[1, 8])) < 1e-7);
    assert!(largest(&stock(1.0, &[8]), &stock(0.0, &[8])) < 1e-7);
    assert!(largest(&stock(1.0, &[2, 4]), &stock(0.0, &[2, 4])) > 1e-3, "control");
}

#[test]
fn models_of_no_length_and_empty_tensors() {
    let x = tuned();
    let zero = [0.0f32; 8];
    for (method, base) in [("slerp", Some(0)), ("nuslerp", None), ("karcher", None), ("multislerp", None)] {
        let case = Case::new(method, &[&zero, &x[0]], base, &[0.5, 0.5]).all("t", 0.5);
        assert!(case.get().iter().all(|v| v.is_finite()), "{method} of zeros and a model");
        let zeros = Case::new(method, &[&zero, &zero], base, &[0.5, 0.5]).all("t", 0.5);
        assert_eq!(zeros.get(), zero, "{method} of zeros");
    }
    // A zero model gives no direction, but halves the mean norm.
    let karcher = Case::new("karcher", &[&zero, &x[0]], None, &[]).get();
    assert!(largest(&karcher, &x[0].iter().map(|v| v / 2.0).collect::<Vec<_>>()) < 1e-6);
    let opposite: Vec<f32> = x[0].iter().map(|v| -v).collect();
    let lerp = Case::new("multislerp", &[&x[0], &opposite], None, &[0.5, 0.5]).get();
    assert_eq!(lerp, zero, "two directions that cancel are interpolated linearly");
    let empty: [f32; 0] = [];
    for method in MergeMethod::all() {
        let models = if method.models().1 == 1 { 1 } else { method.models().0.max(2) };
        let mut inputs = vec![&empty[..]; models];
        if method == MergeMethod::Nuslerp {
            inputs.push(&empty);
        }
        let base = (method.needs_base() || method == MergeMethod::Nuslerp).then_some(0);
        let case =
            Case::new(method.name(), &inputs, base, &[]).all("t", 0.5).own("density", 0.5).shape(&[0, 4]);
        assert!(case.run().is_ok_and(|out| out.is_empty()), "{}: {:?}", method.name(), case.run());
    }
    // What keeps nothing is the base.
    let nothing = Case::new("ties", &[&B, &x[0]], Some(0), &[1.0]).own("density", 0.01).get();
    assert_eq!(nothing, B);
    let cancelling = Case::new("task_arithmetic", &[&B, &x[0], &x[1]], Some(0), &[1.0, -1.0]);
    assert!(cancelling.all("normalize", 1.0).get().iter().all(|v| v.is_finite()));
}

#[test]
fn what_does_not_fit_is_refused_with_every_reason() {
    let x = tuned();
    let short = [0.0f32; 7];
    let error = |case: Case<'_>| case.run().unwrap_err();
    let found = error(Case::new("slerp", &[&B, &x[0], &short], Some(5), &[]).all("t", 0.5));
    for part in ["model 2 has 7", "not among", "needs 1 to 2 models, there are 3"] {
        assert!(found.contains(part), "{part} in {found}");
    }
    assert!(error(Case::new("ties", &[&B, &x[0]], None, &[])).contains("no base"));
    assert!(error(Case::new("slerp", &[&B, &x[0]], Some(0), &[])).contains("`t` is missing"));
    assert!(error(Case::new("model_stock", &[&B, &x[0]], Some(0), &[])).contains("3 models at least"));
    let della = Case::new("della", &[&B, &x[0], &x[1]], Some(0), &[]).own("density", 0.1);
    assert!(error(della).contains("density 0.1 of model 2 is within epsilon 0.15"));
    let bread = Case::new("breadcrumbs", &[&B, &x[0]], Some(0), &[]).own("density", -1.0).own("gamma", 2.0);
    let found = error(bread);
    assert!(found.contains("negative") && found.contains("gamma 2"), "{found}");
    let opposite = Case::new("multislerp", &[&x[0], &x[1]], None, &[1.0, -1.0]);
    assert!(error(opposite).contains("add up to 0"));
}

/// Each method over several pieces, on one thread and on three.
#[test]
fn the_number_of_threads_changes_nothing() {
    let (rows, columns) = (700, 96);
    let draw = |name: &str| Seed(3).normal(name, rows * columns, 1.0);
    let models = ["base", "a", "b", "c"].map(draw);
    let pool = |threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    let (one, three) = (pool(1), pool(3));
    for method in MergeMethod::all() {
        let count = method.models().1.min(4) + usize::from(method == MergeMethod::Nuslerp);
        let inputs: Vec<&[f32]> = models[..count].iter().map(|m| &m[..]).collect();
        let base = method.needs_base() || method == MergeMethod::Nuslerp;
        let case = Case::new(method.name(), &inputs, base.then_some(0), &[0.5, 0.3, 0.4])
            .all("t", 0.4)
            .all("select_topk", 0.4)
            .own("density", 0.4)
            .shape(&[rows, columns]);
        let (a, b) = (one.install(|| case.get()), three.install(|| case.get()));
        assert_eq!(bits(&a), bits(&b), "{}", method.name());
        let other = Case { seed: 1, ..case };
        let random = ["dare_ties", "dare_linear", "della", "della_linear"].contains(&method.name());
        assert_eq!(bits(&other.get()) != bits(&a), random, "control: only random methods hear of the seed");
    }
}
