//! The encoder against transformers on a small BERT with random weights (`tests/golden/bert.py`), and identities of the wiring.

use std::path::{Path, PathBuf};

use burn::tensor::{Device, Int, Tensor, TensorData};
use firebrick_core::{Base, Brick, Part, Run, Seed, Selector, Silent, Site, SiteSet, Skip, Tap, Taps};
use firebrick_models::{
    EmbedOptions, Encoder, EncoderConfig, EncoderFiles, EncoderModel, EncoderWeights, ExportType, ModelError,
    Padding, Pooling, SentenceConfig, TokenTypes, pool, token_tensor,
};
use firebrick_tensor::block::DType;
use firebrick_tensor::checkpoint::{Checkpoint, TensorSpec, write_gguf, write_safetensors};
use serde_json::Value;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/bert")
}

fn model() -> EncoderModel {
    EncoderModel::open(&folder(), &Device::flex()).unwrap()
}

fn golden() -> Value {
    serde_json::from_str(include_str!("../golden/bert.json")).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|v| v.as_u64().unwrap() as u32).collect()
}

fn floats(value: &Value) -> Vec<f32> {
    value.as_array().unwrap().iter().map(|v| v.as_f64().unwrap() as f32).collect()
}

fn host<const D: usize>(t: Tensor<D>) -> Vec<f32> {
    t.into_data().try_into_vec_as::<f32>().unwrap()
}

fn apart(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

fn largest(a: Tensor<3>, b: Tensor<3>) -> f32 {
    (a - b).abs().max().into_scalar()
}

#[test]
fn equals_transformers() {
    let (model, golden) = (model(), golden());
    let encoder = &model.encoder;
    let tap = Tap { sites: encoder.sites().all().filter(|s| matches!(s.part, Part::Embed | Part::Block)) };
    let (mut worst, mut smallest) = (0.0f32, f32::MAX);
    for case in golden["cases"].as_array().unwrap() {
        let tokens = model.tokens(case["text"].as_str().unwrap()).unwrap();
        assert_eq!(tokens, ids(&case["ids"]));
        let bricks: [&dyn Brick; 1] = [&tap];
        let mut run = Run::new(&bricks);
        let hidden = encoder.hidden(token_tensor(&[&tokens], &Device::flex()), &mut run);
        let taps = run.take::<Taps>().unwrap().seen;
        let expected: Vec<Vec<f32>> = case["hidden"].as_array().unwrap().iter().map(floats).collect();
        assert_eq!(taps.len(), expected.len());
        for ((_, x, y), expected) in taps.iter().zip(&expected) {
            worst = worst.max(apart(&host(y.clone()), expected));
            smallest = smallest.min(apart(&host(x.clone()), expected));
        }
        worst = worst.max(apart(&host(hidden.clone()), expected.last().unwrap()));
        worst = worst.max(apart(&host(encoder.pooler(hidden).unwrap()), &floats(&case["pooler"])));
    }
    let pair = &golden["pair"];
    let tokens = token_tensor(&[&ids(&pair["ids"])], &Device::flex());
    let mut run = Run::default();
    let plain = encoder.hidden(tokens.clone(), &mut run);
    run.insert(TokenTypes(token_tensor(&[&ids(&pair["types"])], &Device::flex())));
    let typed = encoder.hidden(tokens, &mut run);
    worst = worst.max(apart(&host(typed.clone()), &floats(&pair["hidden"])));
    assert!(largest(typed, plain) > 1e-2, "control: types matter");
    println!("largest difference from transformers {worst:.1e}");
    assert!(worst < 1e-4, "differs by {worst}");
    assert!(smallest > 1e-2, "control: what goes into a block is not what comes out");
}

#[test]
fn padded_batches_equal_transformers_and_single_texts() {
    let (model, golden) = (model(), golden());
    let encoder = &model.encoder;
    let cases = golden["cases"].as_array().unwrap();
    let texts: Vec<Vec<u32>> = cases.iter().map(|c| ids(&c["ids"])).collect();
    let longest = texts.iter().map(Vec::len).max().unwrap();
    let filled = |with: u32| -> Tensor<2, Int> {
        let rows: Vec<Vec<u32>> =
            texts.iter().map(|t| [t.clone(), vec![with; longest - t.len()]].concat()).collect();
        let rows: Vec<&[u32]> = rows.iter().map(Vec::as_slice).collect();
        token_tensor(&rows, &Device::flex())
    };
    let padding = Padding::new(texts.iter().map(Vec::len).collect());
    let hidden = |with: u32| {
        let mut run = Run::default();
        run.insert(padding.clone());
        encoder.hidden(filled(with), &mut run)
    };
    let (masked, other, open) = (hidden(0), hidden(7), encoder.hidden(filled(0), &mut Run::default()));
    let mut without = 0.0f32;
    for (i, case) in cases.iter().enumerate() {
        let n = texts[i].len();
        let expected = floats(case["hidden"].as_array().unwrap().last().unwrap());
        let row = |t: &Tensor<3>| host(t.clone().narrow(0, i, 1).narrow(1, 0, n));
        assert!(apart(&row(&masked), &expected) < 1e-4, "text {i}");
        assert!(apart(&row(&masked), &row(&other)) < 1e-5, "what fills up has no influence");
        if n < longest {
            without = without.max(apart(&row(&open), &expected));
        }
    }
    assert!(without > 1e-2, "control: without the mask padding is read");
    for pooling in Pooling::ALL {
        let found = host(pool(masked.clone(), Some(&padding), pooling));
        let rows = golden["pooled"][pooling.name()].as_array().unwrap();
        let expected: Vec<f32> = rows.iter().flat_map(floats).collect();
        assert!(apart(&found, &expected) < 1e-4, "{pooling:?}");
    }
    let rows = golden["pooled"]["unmasked_mean"].as_array().unwrap();
    let expected: Vec<f32> = rows.iter().flat_map(floats).collect();
    assert!(apart(&host(pool(open, None, Pooling::Mean)), &expected) < 1e-4, "theirs without a mask");
}

#[test]
fn vectors_come_in_the_order_of_the_texts() {
    let (model, golden) = (model(), golden());
    let texts: Vec<&str> =
        golden["cases"].as_array().unwrap().iter().map(|c| c["text"].as_str().unwrap()).collect();
    let embed = |texts: &[&str], options: EmbedOptions| model.embed(texts, &[], &options, &Silent).unwrap();
    let all = embed(&texts, EmbedOptions::default());
    let mean = golden["pooled"]["mean"].as_array().unwrap();
    for (i, text) in texts.iter().enumerate() {
        let alone = embed(&[text], EmbedOptions::default());
        assert!(apart(&all[i], &alone[0]) < 1e-6, "{text}");
        let expected = floats(&mean[i]);
        let length = expected.iter().map(|v| v * v).sum::<f32>().sqrt();
        let expected: Vec<f32> = expected.iter().map(|v| v / length).collect();
        assert!(apart(&all[i], &expected) < 1e-4, "the folder says mean and normalize");
    }
    assert!(apart(&all[0], &all[1]) > 1e-2, "control: texts differ");
    for batch in [1, 2, 5] {
        let found = embed(&texts, EmbedOptions { batch, ..EmbedOptions::default() });
        assert!(found.iter().zip(&all).all(|(a, b)| apart(a, b) < 1e-6), "batches of {batch}");
    }
    let plain =
        EmbedOptions { pooling: Some(Pooling::Max), normalize: Some(false), ..EmbedOptions::default() };
    let max = golden["pooled"]["max"].as_array().unwrap();
    assert!(embed(&texts, plain).iter().zip(max).all(|(a, b)| apart(a, &floats(b)) < 1e-4));
    assert!(embed(&[], EmbedOptions::default()).is_empty());
}

#[test]
fn long_texts_keep_their_special_tokens() {
    let model = model();
    assert_eq!(model.max_tokens(), 10, "sentence-transformers' limit, of 12 positions");
    let long = "the old brick wall of the red house runs by the river";
    let (kept, all) = (model.tokens(long).unwrap(), model.tokenizer.encode(long, true).unwrap());
    assert_eq!((kept.len(), kept[..9] == all[..9], kept[9]), (10, true, all[all.len() - 1]));
    let limited = |limit| EncoderModel {
        sentence: SentenceConfig { max_tokens: Some(limit), ..SentenceConfig::default() },
        ..self::model()
    };
    assert_eq!(limited(2).tokens(long).unwrap(), [2, 3], "begin and end alone");
    assert!(limited(1).tokens(long).is_err());
    assert_eq!(limited(99).max_tokens(), 12, "no more than there are positions");
}

fn random() -> Encoder {
    Encoder::random(EncoderConfig::tiny(40), Seed(5), &Device::flex()).unwrap()
}

fn some_tokens(n: usize) -> Tensor<2, Int> {
    let ids: Vec<i32> = (0..2 * n as i32).map(|i| (i * 11 + 2) % 40).collect();
    Tensor::from_data(TensorData::new(ids, [2, n]), &Device::flex())
}

#[test]
fn bricks_sit_at_every_site() {
    /// Adds one value to what a site returns.
    struct Add(SiteSet);
    impl Brick for Add {
        fn sites(&self) -> &SiteSet {
            &self.0
        }
        fn at(&self, _: Site, x: Tensor<3>, base: &mut Base<'_>, run: &mut Run<'_>) -> Tensor<3> {
            let y = base(x, run);
            let [_, tokens, d] = y.dims();
            let one = Tensor::<3>::ones([1, 1, 1], &y.device());
            // Not everywhere: a norm would take the same value on all of a row away again.
            y.slice_assign([0..1, tokens - 1..tokens, d - 1..d], one)
        }
    }
    let encoder = random();
    let base = encoder.hidden(some_tokens(5), &mut Run::default());
    for entry in encoder.sites().entries() {
        let add = Add([entry.site].into_iter().collect());
        let bricks: [&dyn Brick; 1] = [&add];
        let changed = encoder.hidden(some_tokens(5), &mut Run::new(&bricks));
        assert!(largest(changed.clone(), base.clone()) > 1e-6, "{}", entry.site);
        let other = largest(changed.narrow(0, 1, 1), base.clone().narrow(0, 1, 1));
        assert_eq!(other, 0.0, "{}: the other text", entry.site);
    }
}

#[test]
fn weights_sites_and_skips_agree() {
    let encoder = random();
    let tokens = || some_tokens(6);
    let sites = encoder.sites();
    for entry in sites.entries().iter().filter(|e| e.tensor.is_some()) {
        let weight = encoder.weight(entry.site).unwrap_or_else(|| panic!("{} has a weight", entry.site));
        if let Some((d_in, d_out)) = sites.linear(entry.site) {
            assert_eq!(weight.dims(), [d_out, d_in]);
            assert_eq!(encoder.bias(entry.site).unwrap().dims(), [d_out]);
        }
    }
    assert_eq!(sites.block_linears().len(), 2 * 6);
    // Without its last block the model is the one whose blocks end before.
    let selector: Selector = "layers.-1".parse().unwrap();
    let skip = Skip { sites: selector.resolve(sites).unwrap().of_part(Part::Block) };
    let bricks: [&dyn Brick; 1] = [&skip];
    let skipped = encoder.hidden(tokens(), &mut Run::new(&bricks));
    let mut run = Run::default();
    let x = encoder.embed(tokens(), &mut run);
    let first = encoder.block(0, x, &mut run);
    assert_eq!(largest(skipped, first.clone()), 0.0);
    let whole = encoder.hidden(tokens(), &mut Run::default());
    assert_eq!(largest(encoder.block(1, first.clone(), &mut run), whole.clone()), 0.0);
    assert!(largest(first, whole.clone()) > 1e-3, "control");
    // A weight put back changes nothing, another one does.
    let site = Site::layer(1, Part::MlpUp);
    let weight = encoder.weight(site).unwrap();
    let same = encoder.clone().with_weight(site, weight.clone());
    assert_eq!(largest(same.hidden(tokens(), &mut Run::default()), whole.clone()), 0.0);
    let twice = encoder.clone().with_weight(site, weight * 2.0);
    assert!(largest(twice.hidden(tokens(), &mut Run::default()), whole) > 1e-4, "control");
}

#[test]
fn every_token_sees_every_other() {
    let encoder = random();
    let whole = encoder.hidden(some_tokens(8), &mut Run::default());
    let short = encoder.hidden(some_tokens(8).narrow(1, 0, 5), &mut Run::default());
    assert!(largest(whole.narrow(1, 0, 5), short) > 1e-4, "earlier tokens see later ones");
}

#[test]
fn a_saved_folder_is_the_same_model() {
    let model = model();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("copy");
    model.save(&path, ExportType::F32).unwrap();
    let copy = EncoderModel::open(&path, &Device::flex()).unwrap();
    assert_eq!(copy.encoder.config(), model.encoder.config());
    assert_eq!(copy.sentence, model.sentence);
    let (a, b) = (Checkpoint::open(folder()).unwrap(), Checkpoint::open(&path).unwrap());
    assert_eq!(a.tensors().len(), b.tensors().len());
    for tensor in a.tensors() {
        assert_eq!(a.bytes(&tensor.name).unwrap(), b.bytes(&tensor.name).unwrap(), "{}", tensor.name);
    }
    let tokenizer = |folder: &Path| std::fs::read(folder.join("tokenizer.json")).unwrap();
    assert_eq!(tokenizer(&folder()), tokenizer(&path));

    let half = dir.path().join("half");
    model.save(&half, ExportType::F16).unwrap();
    let half = EncoderModel::open(&half, &Device::flex()).unwrap();
    let vector = |m: &EncoderModel| {
        m.embed(&["the old wall"], &[], &EmbedOptions::default(), &Silent).unwrap().remove(0)
    };
    assert_eq!(apart(&vector(&model), &vector(&copy)), 0.0);
    let off = apart(&vector(&model), &vector(&half));
    assert!(off > 0.0 && off < 1e-2, "control: half precision rounds, {off}");

    let error = model.save(&path, ExportType::F32).unwrap_err().to_string();
    assert!(error.contains("not empty"), "{error}");
    assert!(model.save(&dir.path().join("packed"), ExportType::Q8_0).is_err());
    let names: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(names.len(), 2, "nothing half written: {names:?}");
}

/// The tensors of the golden model as `change` names them; none are left out.
fn renamed(change: impl Fn(&str) -> Option<String>) -> Vec<(TensorSpec, Vec<u8>)> {
    let checkpoint = Checkpoint::open(folder()).unwrap();
    let tensors = checkpoint.tensors().iter().filter_map(|t| {
        let spec = TensorSpec { name: change(&t.name)?, ..t.spec() };
        Some((spec, checkpoint.bytes(&t.name).unwrap().to_vec()))
    });
    tensors.collect()
}

#[test]
fn other_names_of_the_same_tensors_are_known() {
    let dir = tempfile::tempdir().unwrap();
    let model = model();
    let tokens = || token_tensor(&[&[2, 5, 6, 7, 3]], &Device::flex());
    let expected = model.encoder.hidden(tokens(), &mut Run::default());
    // As saved by `BertForMaskedLM` with TensorFlow's names of the norms, without a pooler.
    let old = |name: &str| {
        let name =
            name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta");
        (!name.starts_with("pooler")).then(|| format!("bert.{name}"))
    };
    let mut tensors = renamed(old);
    let zero = vec![0u8; 128];
    tensors.push((TensorSpec::new("cls.predictions.bias", DType::F32, [32]), zero.clone()));
    for name in ["config.json", "tokenizer.json"] {
        std::fs::copy(folder().join(name), dir.path().join(name)).unwrap();
    }
    let file = dir.path().join("model.safetensors");
    write_safetensors(&file, &Default::default(), &tensors).unwrap();
    let found = EncoderModel::open(dir.path(), &Device::flex()).unwrap();
    assert_eq!(largest(found.encoder.hidden(tokens(), &mut Run::default()), expected.clone()), 0.0);
    assert!(found.encoder.pooler(expected.clone()).is_none());
    assert_eq!(found.sentence, SentenceConfig::default());

    tensors.push((TensorSpec::new("bert.encoder.layer.0.gate.bias", DType::F32, [32]), zero));
    write_safetensors(&file, &Default::default(), &tensors).unwrap();
    let error = EncoderFiles::open(dir.path()).unwrap_err().to_string();
    assert!(error.contains("encoder.layer.0.gate.bias") && !error.contains("cls."), "{error}");

    // The same weights under GGUF's names.
    let known = golden()["gguf_names"].clone();
    let tensors = renamed(|name| known[name].as_str().map(String::from));
    let gguf = dir.path().join("bert.gguf");
    write_gguf(&gguf, &Default::default(), &tensors).unwrap();
    let checkpoint = Checkpoint::open(&gguf).unwrap();
    let config = EncoderConfig { pooler: false, ..model.encoder.config().clone() };
    let found = Encoder::load(config, &EncoderWeights::new(&checkpoint), &Device::flex()).unwrap();
    assert_eq!(largest(found.hidden(tokens(), &mut Run::default()), expected), 0.0);
}

#[test]
fn wrong_files_are_refused_with_every_reason() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["config.json", "tokenizer.json"] {
        std::fs::copy(folder().join(name), dir.path().join(name)).unwrap();
    }
    let file = dir.path().join("model.safetensors");
    let mut tensors = renamed(|name| {
        let gone = name.ends_with("layer.0.attention.self.query.bias")
            || name.ends_with("position_embeddings.weight");
        (!gone).then(|| name.to_string())
    });
    for (spec, _) in &mut tensors {
        if spec.name.ends_with("layer.2.intermediate.dense.weight") {
            spec.shape = vec![16, 24];
        }
    }
    write_safetensors(&file, &Default::default(), &tensors).unwrap();
    let error = EncoderModel::open(dir.path(), &Device::flex()).unwrap_err();
    assert!(matches!(error, ModelError::Weights { .. }));
    let error = error.to_string();
    for name in
        ["layer.0.attention.self.query.bias", "position_embeddings", "layer.2.intermediate.dense.weight"]
    {
        assert!(error.contains(name), "{name} in {error}");
    }
    assert!(!error.contains("layer.1."), "control: {error}");

    // A configuration that claims more than the file has allocates nothing.
    let text = std::fs::read_to_string(folder().join("config.json")).unwrap();
    let claims = text.replace("\"vocab_size\": 32", "\"vocab_size\": 4000000");
    assert_ne!(claims, text);
    std::fs::write(dir.path().join("config.json"), claims).unwrap();
    let error = EncoderModel::open(dir.path(), &Device::flex()).unwrap_err().to_string();
    assert!(error.contains("word_embeddings"), "{error}");
    let fewer = text.replace("\"vocab_size\": 32", "\"vocab_size\": 5");
    std::fs::write(dir.path().join("config.json"), fewer).unwrap();
    let error = EncoderFiles::open(dir.path()).unwrap_err().to_string();
    assert!(error.contains("the tokenizer has ids up to"), "{error}");
    assert!(EncoderFiles::open(&file).is_err(), "a file alone");
    assert!(EncoderFiles::is_encoder(&folder()) && !EncoderFiles::is_encoder(&dir.path().join("x")));
    assert!(EncoderFiles::open(&folder()).is_ok(), "control");
}
