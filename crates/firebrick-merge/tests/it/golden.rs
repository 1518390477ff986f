//! Every deterministic method against files that mergekit 0.1.5 made (`tests/golden/make_merges.py`).

use std::path::Path;

use firebrick_core::Seed;
use firebrick_merge::{
    GlobalParameters, MergeMethod, ModelParameters, Numerics, TensorMerge, Values, merge_tensor,
};
use firebrick_tensor::block::DType;
use firebrick_tensor::checkpoint::Checkpoint;

type Settings = &'static [(&'static str, f64)];

/// As in the script: case, method, base, models, parameters of all, parameters of each.
const CASES: [(&str, &str, &str, &str, Settings, Settings); 28] = [
    ("linear", "linear", "", "abc", &[], &[]),
    ("linear_sum", "linear", "", "abc", &[("normalize", 0.0)], &[]),
    ("slerp", "slerp", "a", "ab", &[("t", 0.3)], &[]),
    ("nuslerp", "nuslerp", "", "ab", &[], &[]),
    ("nuslerp_base", "nuslerp", "base", "ab", &[], &[]),
    ("nuslerp_rows", "nuslerp", "base", "ab", &[("nuslerp_flatten", 0.0)], &[]),
    ("nuslerp_columns", "nuslerp", "base", "ab", &[("nuslerp_flatten", 0.0), ("nuslerp_row_wise", 1.0)], &[]),
    ("passthrough", "passthrough", "", "a", &[], &[("scale", 0.7)]),
    ("task_arithmetic", "task_arithmetic", "base", "abc", &[("lambda", 0.7)], &[]),
    ("task_arithmetic_mean", "task_arithmetic", "base", "abc", &[("normalize", 1.0)], &[]),
    ("ties", "ties", "base", "abc", &[], &[("density", 0.5)]),
    ("ties_sum", "ties", "base", "abc", &[("normalize", 0.0), ("lambda", 1.3)], &[("density", 0.3)]),
    ("ties_rescale", "ties", "base", "abc", &[("rescale", 1.0)], &[("density", 0.5)]),
    ("ties_full", "ties", "base", "abc", &[], &[]),
    ("breadcrumbs", "breadcrumbs", "base", "abc", &[], &[("density", 0.5), ("gamma", 0.15)]),
    ("breadcrumbs_ties", "breadcrumbs_ties", "base", "abc", &[], &[("density", 0.6), ("gamma", 0.2)]),
    ("breadcrumbs_default", "breadcrumbs", "base", "abc", &[], &[("density", 0.5)]),
    ("model_stock", "model_stock", "base", "abc", &[], &[]),
    ("model_stock_rows", "model_stock", "base", "abc", &[("filter_wise", 1.0)], &[]),
    ("karcher", "karcher", "", "abc", &[], &[]),
    ("multislerp", "multislerp", "", "abc", &[], &[]),
    ("multislerp_base", "multislerp", "base", "abc", &[], &[]),
    ("sce", "sce", "base", "abc", &[("select_topk", 0.5)], &[]),
    ("sce_full", "sce", "base", "abc", &[], &[]),
    ("ram", "ram", "base", "abc", &[], &[]),
    ("ramplus_tl", "ramplus_tl", "base", "abc", &[], &[]),
    ("nearswap", "nearswap", "base", "a", &[("t", 0.2)], &[]),
    ("arcee_fusion", "arcee_fusion", "base", "a", &[], &[]),
];

const WEIGHTS: [f64; 3] = [0.5, 0.3, 0.4];

struct Golden {
    file: Checkpoint,
    tied: bool,
    dtype: DType,
}

impl Golden {
    fn open(tied: bool, dtype: DType) -> Self {
        let name = if tied { "tied" } else { "untied" };
        let kind = if dtype == DType::BF16 { "bfloat16" } else { "float32" };
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
        let file = Checkpoint::open(folder.join(format!("{name}_{kind}.safetensors"))).unwrap();
        Golden { file, tied, dtype }
    }

    /// Ours of every tensor with mergekit's and the name, for a case.
    fn merge(
        &self,
        (case, method, base, models, all, own): (&str, &str, &str, &str, Settings, Settings),
        numerics: Numerics,
    ) -> Vec<(String, Vec<f32>, Vec<f32>)> {
        let prefix = format!("{case}/");
        let names = self.file.tensors().iter().filter_map(|t| t.name.strip_prefix(&prefix));
        let method: MergeMethod = method.parse().unwrap();
        let find = |list: Settings, name: &str| list.iter().find(|(n, _)| *n == name).map(|(_, v)| *v);
        let global = GlobalParameters::new(method, |name| find(all, name)).unwrap();
        let mut listed: Vec<String> = models.chars().map(String::from).collect();
        let mut per_model: Vec<_> = WEIGHTS[..listed.len()]
            .iter()
            .map(|w| {
                let value = |name: &str| if name == "weight" { Some(*w) } else { find(own, name) };
                ModelParameters::new(method, value).unwrap()
            })
            .collect();
        if !base.is_empty() && !listed.contains(&base.to_string()) {
            listed.push(base.into());
            per_model.push(ModelParameters::default());
        }
        let one = |name: &str| {
            let read = |model: &String| self.file.read_f32(&format!("{model}/{name}")).unwrap();
            let inputs: Vec<Vec<f32>> = listed.iter().map(read).collect();
            let inputs: Vec<Values<'_>> = inputs.iter().map(|x| Values::from(&x[..])).collect();
            let tensor = TensorMerge {
                inputs: &inputs,
                base: listed.iter().position(|m| m == base),
                shape: &self.file.get(&format!("{case}/{name}")).unwrap().shape,
                per_model: &per_model,
                global: &global,
                seed: Seed(0),
                numerics,
                dtype: self.dtype,
                masks: None,
            };
            let ours = merge_tensor(method, &tensor).unwrap();
            (name.to_string(), ours, read(&case.to_string()))
        };
        names.map(one).collect()
    }
}

/// The largest error of a case, in f32 relative to the largest value of its tensor, in bf16 in units of the last place.
fn worst(golden: &Golden, merged: &[(String, Vec<f32>, Vec<f32>)]) -> f64 {
    let error = |(_, ours, theirs): &(String, Vec<f32>, Vec<f32>)| {
        let scale = theirs.iter().fold(0.0f32, |m, v| m.max(v.abs()));
        let pairs = ours.iter().zip(theirs);
        let errors = pairs.map(|(a, b)| match golden.dtype {
            DType::BF16 => {
                let place = |v: f32| {
                    let bits = i32::from((half::bf16::from_f32(v).to_bits()) as i16);
                    if bits < 0 { -(bits & 0x7fff) } else { bits }
                };
                f64::from((place(*a) - place(*b)).abs())
            }
            _ => f64::from((a - b).abs() / scale),
        });
        errors.fold(0.0, |worst: f64, e| if e.is_nan() { f64::INFINITY } else { worst.max(e) })
    };
    merged.iter().map(error).fold(0.0, f64::max)
}

#[test]
fn every_method_equals_mergekit() {
    let mut wrong = Vec::new();
    for tied in [false, true] {
        for dtype in [DType::F32, DType::BF16] {
            let golden = Golden::open(tied, dtype);
            for case in CASES {
                let merged = golden.merge(case, Numerics::Mergekit);
                assert_eq!(
                    merged.is_empty(),
                    golden.tied && !["linear", "slerp", "ties", "karcher"].contains(&case.0)
                );
                let (error, limit) = (worst(&golden, &merged), if dtype == DType::F32 { 1e-6 } else { 1.0 });
                if error > limit {
                    wrong.push(format!("{} {dtype} tied {tied}: {error}", case.0));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// In f32 both ways to compute are within rounding of each other, and a parameter that is left out shows.
#[test]
fn plain_numerics_equal_mergekit_in_f32() {
    let golden = Golden::open(false, DType::F32);
    for case in CASES {
        let error = worst(&golden, &golden.merge(case, Numerics::F32));
        assert!(error < 1e-6, "{}: {error}", case.0);
        let (name, method, base, models, all, own) = case;
        let switched = |list: Settings| list.is_empty() || list[0].0 == "t";
        if !(switched(all) && switched(own)) {
            let other = golden.merge((name, method, base, models, &[], &[]), Numerics::F32);
            assert!(worst(&golden, &other) > 1e-3, "control: {name} without its parameters");
        }
    }
}
