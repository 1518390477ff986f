//! What a merge takes beside whole checkpoints: models with an adapter.

use std::path::{Path, PathBuf};

use firebrick_core::Silent;
use firebrick_merge::{Merge, MergeConfig, MergeError};
use firebrick_tensor::block::DType;
use firebrick_tensor::checkpoint::{Checkpoint, Metadata, TensorSpec, write_safetensors};
use firebrick_tensor::stream::Executor;

const Q: &str = "model.layers.1.self_attn.q_proj";
const DOWN: &str = "model.layers.2.mlp.down_proj";

fn model() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/config/models/a")
}

/// An adapter of rank 2 on a query projection and one of rank 1 on a layer of the MLP.
pub fn adapter(folder: &Path, seed: f32) {
    std::fs::create_dir_all(folder).unwrap();
    let config = serde_json::json!({
        "peft_type": "LORA", "r": 2, "lora_alpha": 3, "rank_pattern": {"down_proj": 1}, "target_modules": ["q_proj", "down_proj"],
    });
    std::fs::write(folder.join("adapter_config.json"), config.to_string()).unwrap();
    let shapes: [(&str, &str, [usize; 2]); 4] =
        [(Q, "A", [2, 4]), (Q, "B", [4, 2]), (DOWN, "A", [1, 6]), (DOWN, "B", [4, 1])];
    let tensors = shapes.map(|(module, letter, shape)| {
        let name = format!("base_model.model.{module}.lora_{letter}.weight");
        let value = |i: usize| ((i as f32 + seed) * 0.37 + shape[0] as f32).sin();
        let bytes: Vec<u8> = (0..shape[0] * shape[1]).flat_map(|i| value(i).to_le_bytes()).collect();
        (TensorSpec::new(name, DType::F32, shape), bytes)
    });
    write_safetensors(folder.join("adapter_model.safetensors"), &Metadata::default(), &tensors).unwrap();
}

fn open(text: &str) -> Result<Merge, MergeError> {
    let config = MergeConfig::parse(text).unwrap_or_else(|e| panic!("{}", e.join("\n")));
    Merge::new(config, text.to_owned(), Path::new("merge.yml"))
}

fn run(merge: &Merge, out: &Path) -> Checkpoint {
    Executor::default().run(merge, &merge.target(out).unwrap()).unwrap();
    Checkpoint::open(out).unwrap()
}

#[test]
fn an_adapter_is_merged_into_its_model() {
    let root = tempfile::tempdir().unwrap();
    let (lora, out) = (root.path().join("lora"), root.path().join("out"));
    adapter(&lora, 0.0);
    let (base, with) = (model(), format!("{}+{}", model().display(), lora.display()));
    let merge = open(&format!("merge_method: passthrough\nmodels: [{{model: {with}}}]\n")).unwrap();
    let (merged, base) = (run(&merge, &out), Checkpoint::open(base).unwrap());
    let factors = Checkpoint::open(lora.join("adapter_model.safetensors")).unwrap();
    for info in base.tensors() {
        let (before, after) = (base.read_f32(&info.name).unwrap(), merged.read_f32(&info.name).unwrap());
        let module = info.name.trim_end_matches(".weight");
        if ![Q, DOWN].contains(&module) {
            assert_eq!(before, after, "{}", info.name);
            continue;
        }
        let read =
            |letter| factors.read_f32(&format!("base_model.model.{module}.lora_{letter}.weight")).unwrap();
        let (a, b, d_in) = (read("A"), read("B"), info.shape[1]);
        let rank = a.len() / d_in;
        for (i, (before, after)) in before.iter().zip(&after).enumerate() {
            let (row, column) = (i / d_in, i % d_in);
            let product = |k| f64::from(b[row * rank + k]) * f64::from(a[k * d_in + column]);
            let expected = f64::from(*before) + 3.0 / rank as f64 * (0..rank).map(product).sum::<f64>();
            assert!((expected - f64::from(*after)).abs() < 1e-6, "{}[{i}]: {expected}, {after}", info.name);
            assert!((before - after).abs() > 1e-6, "control");
        }
    }
}

#[test]
fn adapters_of_one_base_are_task_vectors() {
    let root = tempfile::tempdir().unwrap();
    let [one, two] = ["one", "two"].map(|name| root.path().join(name));
    adapter(&one, 0.0);
    adapter(&two, 5.0);
    let base = model().display().to_string();
    let models =
        [&one, &two].map(|lora| format!("{{model: {base}+{}, parameters: {{weight: 1}}}}", lora.display()));
    let text =
        format!("merge_method: task_arithmetic\nbase_model: {base}\nmodels: [{}]\n", models.join(", "));
    let merge = open(&text).unwrap();
    let merged = run(&merge, &root.path().join("out"));
    let alone = [&one, &two].map(|lora| {
        let text = format!("merge_method: passthrough\nmodels: [{{model: {base}+{}}}]\n", lora.display());
        run(&open(&text).unwrap(), &lora.join("merged"))
    });
    let name = format!("{Q}.weight");
    let start = Checkpoint::open(model()).unwrap().read_f32(&name).unwrap();
    let read = |c: &Checkpoint| c.read_f32(&name).unwrap();
    for (i, sum) in read(&merged).iter().enumerate() {
        let expected = read(&alone[0])[i] + read(&alone[1])[i] - start[i];
        assert!((expected - sum).abs() < 1e-6);
    }
    // Nothing but the adapters differs, and that is what the analysis sees.
    let analysis = merge.analyze(&Silent).unwrap();
    for (tensor, found) in &analysis.tensors {
        let adapted = [Q, DOWN].iter().any(|module| tensor.starts_with(module));
        assert_eq!(found.norms.iter().all(|n| *n > 0.0), adapted, "{tensor}");
    }
}

#[test]
fn other_bytes_of_an_adapter_are_other_settings() {
    use firebrick_tensor::stream::Transform;
    let root = tempfile::tempdir().unwrap();
    let lora = root.path().join("lora");
    adapter(&lora, 0.0);
    let text =
        format!("merge_method: passthrough\nmodels: [{{model: {}+{}}}]\n", model().display(), lora.display());
    let first = open(&text).unwrap().settings();
    assert_eq!(first, open(&text).unwrap().settings());
    adapter(&lora, 1.0);
    assert_ne!(first, open(&text).unwrap().settings());
}

#[test]
fn adapters_that_do_not_fit_are_refused() {
    let root = tempfile::tempdir().unwrap();
    let lora = root.path().join("lora");
    adapter(&lora, 0.0);
    crate::merges::model(root.path(), "strange", &[("w", &[2], 1.0)]);
    let strange = root.path().join("strange").display().to_string();
    // A checkpoint that is not what its configuration says.
    let names = [format!("{Q}.weight"), format!("{DOWN}.weight")];
    for (folder, shape) in [("wide", [4, 5]), ("right", [4, 4])] {
        crate::merges::model(root.path(), folder, &[(&names[0], &shape, 1.0), (&names[1], &[4, 6], 1.0)]);
        std::fs::copy(model().join("config.json"), root.path().join(folder).join("config.json")).unwrap();
        let path = root.path().join(folder);
        let text = format!(
            "merge_method: passthrough\nmodels: [{{model: {}+{}}}]\n",
            path.display(),
            lora.display()
        );
        match open(&text) {
            Ok(_) => assert_eq!(folder, "right", "control"),
            Err(error) => {
                assert!(error.to_string().contains("does not fit the adapter"), "{folder}: {error}")
            }
        }
    }
    for (model, lora, says) in [
        (strange, lora.clone(), "whose layers are known"),
        (model().display().to_string(), root.path().join("nowhere"), "nowhere"),
        (model().display().to_string(), model(), "adapter_config.json"),
    ] {
        let error =
            open(&format!("merge_method: passthrough\nmodels: [{{model: {model}+{}}}]\n", lora.display()));
        let error = error.unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    }
}
