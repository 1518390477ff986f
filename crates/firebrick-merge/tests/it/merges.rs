//! Merges of checkpoints made here: what is refused, weights, side files, threads.

use std::path::{Path, PathBuf};

use firebrick_core::Seed;
use firebrick_merge::{Merge, MergeError, MergeMethod};
use firebrick_tensor::block::DType;
use firebrick_tensor::checkpoint::{Checkpoint, Metadata, TensorSpec, write_safetensors};
use firebrick_tensor::stream::Executor;

/// A tensor by name, shape and the value of every element.
pub type Entry<'a> = (&'a str, &'a [usize], f32);

const NAMES: [&str; 5] = [
    "model.embed_tokens.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.1.self_attn.q_proj.weight",
    "model.layers.2.self_attn.q_proj.weight",
    "model.layers.2.mlp.up_proj.weight",
];

/// A folder with a checkpoint of these tensors.
pub fn model(root: &Path, name: &str, tensors: &[Entry<'_>]) {
    std::fs::create_dir_all(root.join(name)).unwrap();
    let one = |(name, shape, value): &Entry<'_>| {
        let bytes = vec![value.to_le_bytes(); shape.iter().product()].concat();
        (TensorSpec::new(*name, DType::F32, *shape), bytes)
    };
    let tensors: Vec<_> = tensors.iter().map(one).collect();
    write_safetensors(root.join(name).join("model.safetensors"), &Metadata::default(), &tensors).unwrap();
}

/// A model whose elements are all `value`.
fn flat(root: &Path, name: &str, value: f32) {
    model(root, name, &NAMES.map(|n| (n, &[2, 3][..], value)));
}

/// `text` with every `@name` made a path in `root`.
fn open(root: &Path, text: &str) -> Result<Merge, MergeError> {
    let path = root.join("merge.yml");
    std::fs::write(&path, text.replace('@', &format!("{}/", root.display()))).unwrap();
    Merge::open(&path)
}

fn problems(root: &Path, text: &str) -> Vec<String> {
    match open(root, text).unwrap_err() {
        MergeError::Mismatch { problems, .. } | MergeError::Config { problems, .. } => problems,
        other => panic!("{other}"),
    }
}

/// Runs a merge on so many threads and gives its folder.
fn run(root: &Path, text: &str, out: &str, threads: usize) -> PathBuf {
    let merge = open(root, text).unwrap();
    let out = root.join(out);
    let executor = Executor { threads: Some(threads), ..Executor::default() };
    executor.run(&merge, &merge.target(&out).unwrap()).unwrap();
    out
}

/// The first element of every tensor in the order of [`NAMES`].
fn firsts(folder: &Path) -> Vec<f32> {
    let checkpoint = Checkpoint::open(folder).unwrap();
    NAMES.iter().map(|n| checkpoint.read_f32(n).unwrap()[0]).collect()
}

#[test]
fn models_that_do_not_fit_are_refused_with_every_reason() {
    let root = tempfile::tempdir().unwrap();
    let root = root.path();
    model(root, "a", &[("x", &[2, 2], 1.0), ("y", &[3], 1.0), ("z", &[1], 1.0)]);
    model(root, "b", &[("x", &[2, 2], 1.0), ("y", &[4], 1.0), ("extra", &[1], 1.0)]);
    let linear = "merge_method: linear\nmodels:\n- model: '@a'\n- model: '@b'\nparameters: {weight: 1}\n";
    let found = problems(root, linear);
    assert_eq!(found.len(), 3, "{found:?}");
    for part in ["shape [4]", "lacks `z`", "lacks `extra`"] {
        assert!(found.iter().any(|p| p.contains(part)), "{part} in {found:?}");
    }
    let alone = linear.replace("@b", "@a");
    open(root, &alone).unwrap();
    let cancelling = alone.replace("{weight: 1}", "{weight: 0}");
    let found = problems(root, &cancelling);
    assert!(found[0].contains("weights add up to 0 at `x`, `y`, `z`"), "{found:?}");
}

/// Whole vectors in f32 count, which only `numerics: mergekit` holds.
#[test]
fn rounded_vectors_count_for_the_cap() {
    let root = tempfile::tempdir().unwrap();
    let root = root.path();
    for name in ["a", "b", "c"] {
        model(root, name, &[("model.layers.0.mlp.weight", &[1024, 1024], 1.0)]);
    }
    for method in ["karcher", "nuslerp", "multislerp", "model_stock"] {
        let (base, models) = match method {
            "karcher" => ("", "{model: '@a'}, {model: '@b'}, {model: '@c'}"),
            _ => ("base_model: '@a'\n", "{model: '@b'}, {model: '@c'}"),
        };
        let weight =
            if ["nuslerp", "multislerp"].contains(&method) { "parameters: {weight: 1}\n" } else { "" };
        let text = format!("merge_method: {method}\n{base}models: [{models}]\n{weight}");
        let problems = |more: &str| {
            let merge = open(root, &format!("{text}{more}")).unwrap();
            let executor = Executor { max_memory: Some(40 << 20), ..Executor::default() };
            executor.plan(&merge, &merge.target(&root.join("out")).unwrap()).unwrap().problems
        };
        let found = problems("dtype: bfloat16\nnumerics: mergekit\n");
        assert!(found.len() == 1 && found[0].contains("more than the cap"), "{method}: {found:?}");
        // Controls: nothing is rounded to f32, and without rounding a piece at a time is held.
        assert!(problems("dtype: float32\nnumerics: mergekit\n").is_empty(), "{method}");
        assert!(problems("dtype: bfloat16\n").is_empty(), "{method}");
    }
}

#[test]
fn a_tensor_that_no_filter_matches_is_refused() {
    let root = tempfile::tempdir().unwrap();
    let root = root.path();
    flat(root, "a", 1.0);
    flat(root, "b", 2.0);
    let text = "
merge_method: linear
models:
- model: '@a'
  parameters: {weight: 0.5}
- model: '@b'
  parameters:
    weight:
    - {filter: self_attn, value: 0.5}
    - {filter: mlp, value: 0.5}
";
    let found = problems(root, text);
    assert_eq!(found.len(), 1, "{found:?}");
    assert!(found[0].contains("embed_tokens") && found[0].contains("no filter"), "{found:?}");
    // Control: a default of the merge, or of the list, is a weight.
    open(root, &format!("{text}parameters: {{weight: 0.5}}\n")).unwrap();
    open(root, &format!("{text}    - 0.5\n")).unwrap();
}

#[test]
fn filters_and_gradients_weigh_by_name_and_depth() {
    let root = tempfile::tempdir().unwrap();
    let root = root.path();
    flat(root, "a", 0.0);
    flat(root, "b", 1.0);
    let text = "
merge_method: linear
models:
- model: '@a'
  parameters: {weight: 1}
- model: '@b'
  parameters:
    weight:
    - {filter: self_attn, value: [0, 1, 4]}
    - {filter: mlp, value: 0.5}
    - 2
parameters: {normalize: false}
";
    assert_eq!(firsts(&run(root, text, "out", 1)), [2.0, 0.0, 1.0, 4.0, 0.5]);
    let normalized = text.replace("normalize: false", "normalize: true");
    let expected = [2.0 / 3.0, 0.0, 0.5, 0.8, 1.0 / 3.0];
    assert_eq!(firsts(&run(root, &normalized, "normalized", 1)), expected);
}

#[test]
fn weights_that_cancel_in_single_precision_are_refused() {
    let root = tempfile::tempdir().unwrap();
    let root = root.path();
    for (name, value) in [("a", 1.0), ("b", 2.0), ("c", 3.0)] {
        flat(root, name, value);
    }
    let text = |weights: [f64; 3]| {
        let models = ["a", "b", "c"].iter().zip(weights);
        let models = models.map(|(m, w)| format!("- {{model: '@{m}', parameters: {{weight: {w}}}}}\n"));
        format!("merge_method: linear\nmodels:\n{}", models.collect::<String>())
    };
    // 5.6e-17 in double precision.
    let found = problems(root, &text([0.1, 0.2, -0.3]));
    assert!(found[0].contains("weights add up to 0"), "{found:?}");
    open(root, &text([0.1, 0.2, -0.2])).unwrap();
}

#[test]
fn a_scalar_by_the_name_of_an_embedding_is_a_tensor_like_others() {
    let root = tempfile::tempdir().unwrap();
    let root = root.path();
    model(root, "a", &[("model.embed_tokens.weight", &[], 1.0), ("w", &[2], 2.0)]);
    std::fs::write(root.join("a/config.json"), "{\"vocab_size\": 7}").unwrap();
    let out = run(root, "merge_method: passthrough\nmodels: [{model: '@a'}]\n", "out", 1);
    assert!(std::fs::read_to_string(out.join("config.json")).unwrap().contains('7'));
}

#[test]
fn what_no_model_changed_stays_as_it_is() {
    let root = tempfile::tempdir().unwrap();
    let root = root.path();
    for name in ["base", "a", "b", "c"] {
        flat(root, name, 0.5);
    }
    let text = "merge_method: multislerp\nbase_model: '@base'\nmodels:\n- model: '@a'\n- model: '@b'\n- model: '@c'\n\
                parameters: {weight: 1}\n";
    assert_eq!(firsts(&run(root, text, "out", 1)), [0.5; 5]);
}

#[test]
fn layer_numbers_of_hostile_names_are_harmless() {
    let root = tempfile::tempdir().unwrap();
    let root = root.path();
    let names =
        ["layers.18446744073709551615.w", "layers.4294967295.w", "layers.99999999999999999999999.w", "w"];
    model(root, "a", &names.map(|n| (n, &[1][..], 1.0)));
    let text = "merge_method: linear\nmodels:\n- model: '@a'\n  parameters: {weight: [1, 2, 3]}\n";
    open(root, text).unwrap();
}

#[test]
fn single_files_take_what_lies_beside_them() {
    let root = tempfile::tempdir().unwrap();
    let root = root.path();
    flat(root, "a", 1.0);
    flat(root, "b", 3.0);
    std::fs::write(root.join("a/config.json"), "{\"torch_dtype\": \"float32\"}").unwrap();
    let text = "
merge_method: task_arithmetic
base_model: '@a/model.safetensors'
models:
- model: '@b/model.safetensors'
  parameters: {weight: 0.5}
dtype: bfloat16
";
    let out = run(root, text, "out", 1);
    assert_eq!(firsts(&out), [2.0; 5]);
    let config = std::fs::read_to_string(out.join("config.json")).unwrap();
    assert!(config.contains("bfloat16"), "{config}");
    let folders = run(root, &text.replace("/model.safetensors", ""), "folders", 1);
    for file in ["config.json", "model.safetensors"] {
        let bytes = |folder: &Path| std::fs::read(folder.join(file)).unwrap();
        assert_eq!(bytes(&out), bytes(&folders), "{file}");
    }
}

#[test]
fn weights_1_and_0_return_the_model_on_any_number_of_threads() {
    let root = tempfile::tempdir().unwrap();
    let root = root.path();
    model(root, "a", &[("x", &[300, 700], -0.0), ("y", &[70_000], 1.7)]);
    model(root, "b", &[("x", &[300, 700], 1.0), ("y", &[70_000], -2.3)]);
    let text = "
merge_method: linear
models:
- model: '@a'
  parameters: {weight: 1}
- model: '@b'
  parameters: {weight: 0}
";
    let bytes = |folder: &Path| {
        let checkpoint = Checkpoint::open(folder).unwrap();
        ["x", "y"].map(|n| checkpoint.read_f32(n).unwrap().into_iter().map(f32::to_bits).collect::<Vec<_>>())
    };
    let one = run(root, text, "one", 1);
    assert_eq!(bytes(&one), bytes(&root.join("a")));
    let half = text.replace("weight: 1", "weight: 0.3").replace("weight: 0}", "weight: 0.7}");
    let (single, several) = (run(root, &half, "single", 1), run(root, &half, "several", 3));
    assert_eq!(bytes(&single), bytes(&several));
    assert_ne!(bytes(&single), bytes(&one), "control");
}

/// Every method from its YAML, over several pieces, in bf16: the same bytes on one thread and on two, and others under another seed
/// where the method draws.
#[test]
fn every_method_runs_from_its_file() {
    let root = tempfile::tempdir().unwrap();
    let root = root.path();
    for (i, name) in ["base", "a", "b"].iter().enumerate() {
        std::fs::create_dir_all(root.join(name)).unwrap();
        let shapes: [(&str, &[usize]); 2] = [("layers.0.w", &[150, 300]), ("layers.1.norm", &[300])];
        let tensors = shapes.map(|(tensor, shape)| {
            let values = Seed(i as u64).normal(tensor, shape.iter().product(), 1.0);
            let bytes: Vec<u8> = values.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()).collect();
            (TensorSpec::new(tensor, DType::BF16, shape), bytes)
        });
        write_safetensors(root.join(name).join("model.safetensors"), &Metadata::default(), &tensors).unwrap();
    }
    for method in MergeMethod::all() {
        let has = |name: &str| method.parameters().iter().any(|p| p.name == name);
        let parameters: String = [("t", "0.4"), ("density", "0.5"), ("weight", "0.5"), ("lambda", "0.9")]
            .iter()
            .filter(|(name, _)| has(name))
            .map(|(name, value)| format!("  {name}: {value}\n"))
            .collect();
        let models = match method {
            MergeMethod::Passthrough => "- model: '@a'\n",
            MergeMethod::Slerp | MergeMethod::Nearswap | MergeMethod::ArceeFusion => {
                "- model: '@base'\n- model: '@a'\n"
            }
            _ => "- model: '@a'\n- model: '@b'\n",
        };
        let base = if method.needs_base() { "base_model: '@base'\n" } else { "" };
        let name = method.name();
        let text = format!(
            "merge_method: {name}\n{base}models:\n{models}parameters:\n{parameters}  int8_mask: true\n"
        );
        let bytes = |text: &str, out: &str, threads| {
            std::fs::read(run(root, text, &format!("{name}-{out}"), threads).join("model.safetensors"))
                .unwrap()
        };
        let one = bytes(&text, "one", 1);
        assert_eq!(one, bytes(&text, "two", 2), "{name}");
        let draws = ["dare_ties", "dare_linear", "della", "della_linear"].contains(&name);
        assert_eq!(one != bytes(&format!("{text}seed: 7\n"), "seed", 2), draws, "control: {name}");
    }
}
