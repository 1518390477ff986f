//! Vocabulary transplant: the pursuit against plain references, identities, and what it keeps of the embedded model.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use burn::tensor::Device;
use firebrick_core::{Part, Run, Seed, Silent, Site};
use firebrick_merge::MergeError;
use firebrick_merge::vocabulary_transplant::{
    Combination, TransplantMethod, TransplantSettings, VocabularyTransplant, nearest, omp,
};
use firebrick_models::tokenizer::{Tokenizer, train_bpe};
use firebrick_models::{
    Decoder, DecoderConfig, Export, ExportType, Model, ModelError, ModelFiles, TensorSource, token_tensor,
};
use firebrick_tensor::checkpoint::Checkpoint;
use firebrick_tensor::linalg::Matrix;
use firebrick_tensor::stream::Executor;
use firebrick_train::{domain, perplexity};
use serde_json::{Value, json};

const TEXT: &str = "The miller had three sons, and the youngest of them was left nothing but the cat.";
const EMBEDDING: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";

fn random(rows: usize, columns: usize, seed: u64, name: &str) -> Matrix {
    Matrix::random_normal(rows, columns, Seed(seed), name)
}

/// What is left of a row.
fn residual(atoms: &Matrix, target: &[f64], combination: &Combination) -> f64 {
    let mut left = target.to_vec();
    for (atom, c) in combination {
        left.iter_mut().zip(atoms.row(*atom)).for_each(|(l, a)| *l -= c * a);
    }
    left.iter().map(|l| l * l).sum::<f64>().sqrt()
}

fn norm(a: &[f64]) -> f64 {
    a.iter().map(|v| v * v).sum::<f64>().sqrt()
}

#[test]
fn planted_combinations_come_back() {
    for seed in 0..3 {
        let atoms = random(400, 256, seed, "atoms");
        let mut planted: Vec<Combination> = Vec::new();
        let mut targets = Matrix::zeros(20, 256);
        for row in 0..20 {
            let draws = Seed(seed).uniform(&format!("plant/{row}"), 10, 0.5);
            let mut found = Combination::new();
            for (i, pair) in draws.chunks(2).enumerate() {
                let atom = 80 * i + ((pair[0] + 0.5) * 79.0) as usize;
                found.push((atom, f64::from(pair[1].signum() * (0.5 + pair[1].abs()))));
            }
            for (atom, c) in &found {
                for column in 0..256 {
                    targets[(row, column)] += c * atoms[(*atom, column)];
                }
            }
            planted.push(found);
        }
        // In the precision of a file.
        let targets = Matrix::from_f32(20, 256, &targets.to_f32()).unwrap();
        for k in [5, 64] {
            for (mut found, planted) in omp(&atoms, &targets, k).unwrap().into_iter().zip(&planted) {
                found.sort_by_key(|pair| pair.0);
                assert_eq!(found.len(), 5, "it ends where nothing is left");
                for (a, b) in found.iter().zip(planted) {
                    assert!(a.0 == b.0 && (a.1 - b.1).abs() < 1e-5, "{found:?} {planted:?}");
                }
            }
        }
        for (row, found) in omp(&atoms, &targets, 4).unwrap().iter().enumerate() {
            let left = residual(&atoms, targets.row(row), found) / norm(targets.row(row));
            assert!(left > 0.05, "control: 4 are too few, {left}");
        }
    }
}

/// Least squares by the normal equations and Gauss's elimination.
fn least_squares(atoms: &Matrix, chosen: &[usize], target: &[f64]) -> Vec<f64> {
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let n = chosen.len();
    let mut system: Vec<Vec<f64>> = chosen
        .iter()
        .map(|i| {
            let products = chosen.iter().map(|j| dot(atoms.row(*i), atoms.row(*j)));
            products.chain([dot(atoms.row(*i), target)]).collect()
        })
        .collect();
    for pivot in 0..n {
        let best = (pivot..n).max_by(|a, b| system[*a][pivot].abs().total_cmp(&system[*b][pivot].abs()));
        system.swap(pivot, best.unwrap());
        let row = system[pivot].clone();
        for (_, other) in system.iter_mut().enumerate().filter(|(i, _)| *i != pivot) {
            let factor = other[pivot] / row[pivot];
            other.iter_mut().zip(&row).for_each(|(o, r)| *o -= factor * r);
        }
    }
    (0..n).map(|i| system[i][n] / system[i][i]).collect()
}

/// Orthogonal matching pursuit as it is defined: least squares anew at each step.
fn plain_omp(atoms: &Matrix, target: &[f64], k: usize) -> Combination {
    let (mut chosen, mut c): (Vec<usize>, Vec<f64>) = (Vec::new(), Vec::new());
    for _ in 0..k {
        let mut left = target.to_vec();
        for (atom, c) in chosen.iter().zip(&c) {
            left.iter_mut().zip(atoms.row(*atom)).for_each(|(l, a)| *l -= c * a);
        }
        let score = |i: &usize| atoms.row(*i).iter().zip(&left).map(|(a, l)| a * l).sum::<f64>().abs();
        let free = (0..atoms.rows()).filter(|i| !chosen.contains(i));
        chosen.push(free.max_by(|a, b| score(a).total_cmp(&score(b))).unwrap());
        c = least_squares(atoms, &chosen, target);
    }
    chosen.into_iter().zip(c).collect()
}

#[test]
fn the_pursuit_is_that_of_the_definition() {
    for seed in 0..3 {
        let (atoms, targets) = (random(150, 40, seed, "atoms"), random(9, 40, seed, "targets"));
        let mut before: Option<Vec<Combination>> = None;
        for k in [1, 4, 16, 32] {
            let found = omp(&atoms, &targets, k).unwrap();
            for (row, found) in found.iter().enumerate() {
                let plain = plain_omp(&atoms, targets.row(row), k);
                assert_eq!(found.len(), k);
                for (a, b) in found.iter().zip(&plain) {
                    assert!(a.0 == b.0 && (a.1 - b.1).abs() < 1e-8, "{found:?} {plain:?}");
                }
                if let Some(before) = &before {
                    let less = &before[row];
                    assert!(less.iter().zip(found).all(|(a, b)| a.0 == b.0), "atoms stay when k grows");
                    assert!(less.iter().zip(found).any(|(a, b)| a.1 != b.1), "control: coefficients do not");
                    let left = |c| residual(&atoms, targets.row(row), c);
                    assert!(left(found) < left(less));
                }
            }
            before = Some(found);
        }
        // As many directions as there are leave nothing, and more atoms are not taken.
        for (row, found) in omp(&atoms, &targets, 150).unwrap().iter().enumerate() {
            assert!(found.len() <= 40 && residual(&atoms, targets.row(row), found) < 1e-6);
        }
    }
}

#[test]
fn nearest_tokens_are_weighted_by_least_squares() {
    let (atoms, targets) = (random(60, 30, 1, "atoms"), random(5, 30, 1, "targets"));
    let found = nearest(&atoms, &targets, 8).unwrap();
    let mut differs = false;
    for (row, found) in found.iter().enumerate() {
        let target = targets.row(row);
        let cosine =
            |i: usize| atoms.row(i).iter().zip(target).map(|(a, t)| a * t).sum::<f64>() / norm(atoms.row(i));
        let mut order: Vec<usize> = (0..60).collect();
        order.sort_by(|a, b| cosine(*b).total_cmp(&cosine(*a)));
        assert_eq!(found.iter().map(|pair| pair.0).collect::<Vec<_>>(), order[..8]);
        let plain = least_squares(&atoms, &order[..8], target);
        assert!(found.iter().zip(&plain).all(|(a, b)| (a.1 - b).abs() < 1e-9));
        let pursuit = omp(&atoms, &Matrix::new(1, 30, target.to_vec()).unwrap(), 8).unwrap();
        differs |= pursuit[0].iter().any(|pair| !order[..8].contains(&pair.0));
    }
    assert!(differs, "control: the pursuit takes others");
}

#[test]
fn odd_atoms_do_no_harm() {
    // Twice the same, one that depends on others, and zeros.
    let mut atoms = random(12, 6, 3, "atoms");
    for column in 0..6 {
        atoms[(1, column)] = atoms[(0, column)];
        atoms[(2, column)] = atoms[(0, column)] + atoms[(3, column)];
        atoms[(4, column)] = 0.0;
    }
    let mut targets = random(4, 6, 3, "targets");
    targets.data_mut()[..6].fill(0.0);
    for combinations in [omp(&atoms, &targets, 12).unwrap(), nearest(&atoms, &targets, 12).unwrap()] {
        assert!(combinations[0].is_empty(), "nothing needs nothing");
        for (row, found) in combinations.iter().enumerate() {
            assert!(found.iter().all(|(atom, c)| c.is_finite() && *atom != 4), "{found:?}");
            assert!(residual(&atoms, targets.row(row), found) < 1e-6);
        }
    }
    assert!(omp(&Matrix::zeros(3, 6), &targets, 2).unwrap().iter().all(Vec::is_empty));
    omp(&Matrix::zeros(3, 5), &targets, 2).unwrap_err();
}

#[test]
fn threads_do_not_matter() {
    let (atoms, targets) = (random(700, 50, 1, "atoms"), random(70, 50, 1, "targets"));
    let on = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| (omp(&atoms, &targets, 20).unwrap(), nearest(&atoms, &targets, 20).unwrap()))
    };
    assert_eq!(on(1), on(3));
    let (omp, nearest) = on(2);
    assert_ne!(omp, nearest, "control");
}

/// A tokenizer whose token `id` gets the id `of[id]`, or goes.
fn renumbered(tokenizer: &Tokenizer, of: &[Option<u32>]) -> Tokenizer {
    let dir = tempfile::tempdir().unwrap();
    let new = |id: &Value| id.as_u64().and_then(|id| of[id as usize]);
    for (name, bytes) in tokenizer.files().unwrap() {
        let path = dir.path().join(&name);
        let Ok(mut json) = serde_json::from_slice::<Value>(&bytes) else {
            std::fs::write(path, bytes).unwrap();
            continue;
        };
        if name == "tokenizer.json" {
            let vocab = json["model"]["vocab"].as_object().unwrap().clone();
            let kept = vocab.iter().filter_map(|(token, id)| Some((token.clone(), new(id)?)));
            let kept: serde_json::Map<String, Value> = kept.map(|(t, id)| (t, id.into())).collect();
            let pair = |merge: &Value| match merge {
                Value::String(text) => {
                    text.split_once(' ').map(|(a, b)| (a.to_owned(), b.to_owned())).unwrap()
                }
                list => (list[0].as_str().unwrap().to_owned(), list[1].as_str().unwrap().to_owned()),
            };
            let stays = |merge: &Value| {
                let (a, b) = pair(merge);
                [&a, &b, &format!("{a}{b}")].into_iter().all(|token| kept.contains_key(token))
            };
            json["model"]["merges"].as_array_mut().unwrap().retain(stays);
            json["model"]["vocab"] = kept.into();
            for word in json["added_tokens"].as_array_mut().unwrap() {
                word["id"] = new(&word["id"]).unwrap().into();
            }
        }
        if name == "generation_config.json" {
            for (_, id) in json.as_object_mut().unwrap() {
                *id = match &*id {
                    Value::Array(ids) => ids.iter().map(|id| new(id).unwrap()).collect::<Vec<_>>().into(),
                    one => new(one).unwrap().into(),
                };
            }
        }
        std::fs::write(path, json.to_string()).unwrap();
    }
    Tokenizer::from_folder(dir.path()).unwrap()
}

/// A tokenizer with these tokens at the end of its vocabulary, which nothing makes.
fn with_tokens(tokenizer: &Tokenizer, tokens: &[&str]) -> Tokenizer {
    let dir = tempfile::tempdir().unwrap();
    tokenizer.save(dir.path()).unwrap();
    let path = dir.path().join("tokenizer.json");
    let mut json: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    for (token, id) in tokens.iter().zip(tokenizer.vocab_size()..) {
        json["model"]["vocab"][*token] = id.into();
    }
    std::fs::write(path, json.to_string()).unwrap();
    Tokenizer::from_folder(dir.path()).unwrap()
}

fn save(root: &Path, name: &str, decoder: &Decoder, tokenizer: &Tokenizer) -> ModelFiles {
    save_as(root, name, decoder, tokenizer, ExportType::F32)
}

fn save_as(
    root: &Path,
    name: &str,
    decoder: &Decoder,
    tokenizer: &Tokenizer,
    dtype: ExportType,
) -> ModelFiles {
    let path = root.join(name);
    Export::decoder(name, decoder, tokenizer, dtype).write(&path, &Executor::default()).unwrap();
    ModelFiles::open(&path).unwrap()
}

fn settings(method: TransplantMethod) -> TransplantSettings {
    TransplantSettings { method, ..TransplantSettings::default() }
}

fn transplanted(model: &ModelFiles, donor: &ModelFiles, settings: TransplantSettings, out: &Path) -> PathBuf {
    let transplant = VocabularyTransplant::new(model, donor, settings).unwrap();
    Executor::default().run(&transplant, &transplant.target(out).unwrap()).unwrap();
    out.to_owned()
}

fn matrix(checkpoint: &Checkpoint, name: &str) -> Matrix {
    let shape = checkpoint.get(name).unwrap().shape.clone();
    Matrix::from_f32(shape[0], shape[1], &checkpoint.read_f32(name).unwrap()).unwrap()
}

/// A decoder with other rows of tokens.
struct WithRows<'a> {
    decoder: &'a Decoder,
    rows: &'a dyn Fn(Vec<f32>) -> Vec<f32>,
}

impl TensorSource for WithRows<'_> {
    fn read_site(&self, site: Site, shape: &[usize]) -> Result<Vec<f32>, ModelError> {
        if ![Part::Embed, Part::Head].contains(&site.part) {
            return self.decoder.read_site(site, shape);
        }
        let dims = self.decoder.weight(site).unwrap().dims();
        Ok((self.rows)(self.decoder.read_site(site, &dims)?))
    }

    fn check_site(&self, _: Site, _: &[usize]) -> Result<(), ModelError> {
        Ok(())
    }
}

fn with_rows(decoder: &Decoder, vocab: usize, rows: &dyn Fn(Vec<f32>) -> Vec<f32>) -> Decoder {
    let config = DecoderConfig { vocab, ..decoder.config().clone() };
    Decoder::load(config, &WithRows { decoder, rows }, &Device::flex()).unwrap()
}

fn tiny(seed: u64, vocab: usize, tied_head: bool, d_model: usize) -> Decoder {
    let config = DecoderConfig { tied_head, d_model, ..DecoderConfig::tiny(vocab) };
    Decoder::random(config, Seed(seed), &Device::flex()).unwrap()
}

#[test]
fn the_same_tokenizer_leaves_the_model_as_it_is() {
    let root = tempfile::tempdir().unwrap();
    let tokenizer = ModelFiles::embedded().unwrap().tokenizer;
    let vocab = tokenizer.vocab_size();
    let donor = save(root.path(), "donor", &tiny(9, vocab, true, 32), &tokenizer);
    for (tied, dtype) in [(true, ExportType::F32), (false, ExportType::BF16), (false, ExportType::F16)] {
        let name = format!("{tied}-{}", dtype.dtype());
        // Rows behind those of the tokenizer stay, too.
        let model = save_as(root.path(), &name, &tiny(1, vocab + 5, tied, 16), &tokenizer, dtype);
        let out =
            transplanted(&model, &donor, TransplantSettings::default(), &root.path().join(name + "-out"));
        let found = ModelFiles::open(&out).unwrap();
        assert_eq!(found.config, model.config);
        assert_eq!(found.checkpoint.tensors().len(), model.checkpoint.tensors().len());
        for tensor in model.checkpoint.tensors() {
            let bytes = |files: &ModelFiles| files.checkpoint.bytes(&tensor.name).unwrap().to_vec();
            assert_eq!(bytes(&found), bytes(&model), "{}", tensor.name);
        }
    }
}

#[test]
fn another_order_of_tokens_is_another_order_of_rows() {
    let root = tempfile::tempdir().unwrap();
    let device = Device::flex();
    let model = ModelFiles::embedded().unwrap();
    let vocab = model.tokenizer.vocab_size();
    let order: Vec<Option<u32>> = (0..vocab).map(|id| Some(((id * 1001 + 77) % vocab) as u32)).collect();
    assert_eq!(order.iter().collect::<HashSet<_>>().len(), vocab);
    let tokenizer = renumbered(&model.tokenizer, &order);
    let donor = save(root.path(), "donor", &tiny(2, vocab, false, 16), &tokenizer);
    let transplant = VocabularyTransplant::new(&model, &donor, TransplantSettings::default()).unwrap();
    assert_eq!((transplant.shared(), transplant.filled()), (vocab, 0));
    let out = transplanted(&model, &donor, TransplantSettings::default(), &root.path().join("out"));
    let found = ModelFiles::open(&out).unwrap();
    let bits = |files: &ModelFiles| {
        let name = files.weights().tensor_name(Site::global(Part::Embed)).unwrap();
        files.checkpoint.read_f32(&name).unwrap().iter().map(|v| v.to_bits()).collect::<Vec<_>>()
    };
    let (ours, theirs, width) = (bits(&model), bits(&found), model.config.d_model);
    for (id, new) in order.iter().enumerate() {
        let at = new.unwrap() as usize * width;
        assert_eq!(theirs[at..at + width], ours[id * width..(id + 1) * width], "{id}");
    }
    assert_ne!(ours, theirs, "control");
    // Special tokens go along, in the tokenizer and the configuration.
    let end = |t: &Tokenizer| t.eos_ids().to_vec();
    let moved: Vec<u32> = end(&model.tokenizer).iter().map(|id| order[*id as usize].unwrap()).collect();
    assert_eq!(end(&found.tokenizer), moved);
    let config: Value = serde_json::from_slice(&std::fs::read(out.join("config.json")).unwrap()).unwrap();
    assert_eq!(config["eos_token_id"], json!(moved));
    assert_eq!(config["bos_token_id"], json!(found.tokenizer.bos_id()));
    assert_eq!(config["vocab_size"], json!(vocab));
    let logits = |model: &Model| {
        let ids = model.tokenizer.encode(TEXT, false).unwrap();
        let logits = model.decoder.forward(token_tensor(&[&ids], &device), &mut Run::default());
        (ids, logits.into_data().try_into_vec_as::<f32>().unwrap())
    };
    let (ids, ours) = logits(&model.load(&device).unwrap());
    let (new_ids, theirs) = logits(&found.load(&device).unwrap());
    assert_eq!(new_ids, ids.iter().map(|id| order[*id as usize].unwrap()).collect::<Vec<_>>());
    assert_ne!(new_ids, ids, "control");
    for (a, b) in ours.chunks(vocab).zip(theirs.chunks(vocab)) {
        for (id, new) in order.iter().enumerate() {
            let (a, b) = (a[id], b[new.unwrap() as usize]);
            assert!((a - b).abs() < 1e-5 * a.abs().max(1.0), "{a} {b}");
        }
    }
}

/// Small tokenizers of which neither has all tokens of the other.
fn pair() -> (Tokenizer, Tokenizer) {
    let text = |name: &str| domain(name).unwrap().train_text().chars().take(20_000).collect::<String>();
    (train_bpe([text("prose").as_str()], 360).unwrap(), train_bpe([text("rust").as_str()], 400).unwrap())
}

#[test]
fn heads_are_made_from_heads() {
    let root = tempfile::tempdir().unwrap();
    let (own, theirs) = pair();
    for (model_tied, donor_tied) in [(true, true), (true, false), (false, true), (false, false)] {
        let name = format!("{model_tied}-{donor_tied}");
        let dir = root.path().join(&name);
        let model = save(&dir, "model", &tiny(1, 360, model_tied, 16), &own);
        let donor = save(&dir, "donor", &tiny(2, 400, donor_tied, 24), &theirs);
        let settings = TransplantSettings { k: 6, ..TransplantSettings::default() };
        let transplant = VocabularyTransplant::new(&model, &donor, settings).unwrap();
        let out = ModelFiles::open(&transplanted(&model, &donor, settings, &dir.join("out"))).unwrap();
        assert_eq!(out.checkpoint.get(HEAD).is_none(), model_tied);
        let shared: Vec<(usize, usize)> = (0..400)
            .filter_map(|id| Some((id as usize, own.id(&theirs.token(id).unwrap())? as usize)))
            .collect();
        assert_eq!(transplant.shared(), shared.len());
        assert!(transplant.filled() > 50);
        for name in [EMBEDDING, HEAD].into_iter().filter(|name| out.checkpoint.get(name).is_some()) {
            let theirs = if donor_tied { EMBEDDING } else { name };
            let (ours, theirs) = (matrix(&model.checkpoint, name), matrix(&donor.checkpoint, theirs));
            let made = matrix(&out.checkpoint, name);
            assert_eq!((made.rows(), made.cols()), (400, 16));
            let atoms = Matrix::from_fn(shared.len(), 24, |i, j| theirs[(shared[i].0, j)]);
            let found = omp(&atoms, &theirs, 6).unwrap();
            for (id, combination) in found.iter().enumerate() {
                let mut expected = vec![0.0; 16];
                match shared.iter().find(|pair| pair.0 == id) {
                    Some((_, row)) => expected = ours.row(*row).to_vec(),
                    None => combination.iter().for_each(|(atom, c)| {
                        let row = ours.row(shared[*atom].1);
                        expected.iter_mut().zip(row).for_each(|(e, o)| *e += c * o);
                    }),
                }
                for (a, b) in expected.iter().zip(made.row(id)) {
                    assert!((a - b).abs() < 1e-6 * a.abs().max(1.0), "{name} {id}: {a} {b}");
                }
            }
        }
        for tensor in model.checkpoint.tensors().iter().filter(|t| ![EMBEDDING, HEAD].contains(&&*t.name)) {
            let bytes = |files: &ModelFiles| files.checkpoint.bytes(&tensor.name).unwrap().to_vec();
            assert_eq!(bytes(&out), bytes(&model), "{}", tensor.name);
        }
    }
}

/// Rows that were never trained, in the model or in the donor, are copied for their own tokens and no other is made of them.
#[test]
fn untrained_rows_make_no_others() {
    let root = tempfile::tempdir().unwrap();
    let (own, theirs) = pair();
    let shared: Vec<(usize, usize)> =
        (0..400).filter_map(|id| Some((id as usize, own.id(&theirs.token(id).unwrap())? as usize))).collect();
    // Of the donor four alike and one near 0, of the model three alike, one of which is one of those.
    let (alike, small) = (&shared[10..14], shared[20]);
    let ours = [shared[13], shared[30], shared[31]];
    let left_out: HashSet<usize> =
        alike.iter().chain([&small]).chain(&ours).map(|(donor, _)| *donor).collect();
    let copy = |rows: &mut [f32], width: usize, ids: &[usize]| {
        let first = rows[ids[0] * width..][..width].to_vec();
        ids.iter().for_each(|id| rows[id * width..][..width].copy_from_slice(&first));
    };
    let model = with_rows(&tiny(1, 360, true, 16), 360, &|mut rows| {
        copy(&mut rows, 16, &ours.map(|(_, own)| own));
        rows
    });
    let donor = with_rows(&tiny(2, 400, true, 24), 400, &|mut rows| {
        copy(&mut rows, 24, &alike.iter().map(|(donor, _)| *donor).collect::<Vec<_>>());
        rows[small.0 * 24..][..24].iter_mut().for_each(|v| *v *= 1e-6);
        rows
    });
    let model = save(root.path(), "model", &model, &own);
    let donor = save(root.path(), "donor", &donor, &theirs);
    let settings = TransplantSettings { k: 6, ..TransplantSettings::default() };
    let transplant = VocabularyTransplant::new(&model, &donor, settings).unwrap();
    assert_eq!((transplant.shared(), transplant.untrained()), (shared.len(), left_out.len()));
    let out = ModelFiles::open(&transplanted(&model, &donor, settings, &root.path().join("out"))).unwrap();
    let [ours, theirs, made] = [&model, &donor, &out].map(|files| matrix(&files.checkpoint, EMBEDDING));
    // The rows made of these anchors.
    let by = |anchors: &[(usize, usize)]| -> Vec<Vec<f64>> {
        let atoms = Matrix::from_fn(anchors.len(), 24, |i, j| theirs[(anchors[i].0, j)]);
        let combine = |combination: &Combination| {
            let mut sum = vec![0.0; 16];
            for (atom, c) in combination {
                sum.iter_mut().zip(ours.row(anchors[*atom].1)).for_each(|(s, o)| *s += c * o);
            }
            sum
        };
        omp(&atoms, &theirs, 6).unwrap().iter().map(combine).collect()
    };
    let trained: Vec<(usize, usize)> =
        shared.iter().copied().filter(|(donor, _)| !left_out.contains(donor)).collect();
    let (expected, with_all) = (by(&trained), by(&shared));
    let far = |a: &[f64], b: &[f64]| a.iter().zip(b).any(|(a, b)| (a - b).abs() > 1e-6 * a.abs().max(1.0));
    let mut differs = 0;
    for id in 0..400 {
        match shared.iter().find(|pair| pair.0 == id) {
            Some((_, own)) => assert_eq!(made.row(id), ours.row(*own), "{id} is copied"),
            None => {
                assert!(!far(&expected[id], made.row(id)), "{id}");
                differs += usize::from(far(&with_all[id], made.row(id)));
            }
        }
    }
    assert!(differs > 0, "control: of untrained rows others would be made");
    // Methods that combine none leave none out.
    let zero = VocabularyTransplant::new(&model, &donor, self::settings(TransplantMethod::Zero)).unwrap();
    assert_eq!(zero.untrained(), 0);
    // Where no anchor is left, nothing can be made.
    let blank = with_rows(&tiny(1, 360, true, 16), 360, &|rows| vec![0.5; rows.len()]);
    let blank = save(root.path(), "blank", &blank, &own);
    let error = VocabularyTransplant::new(&blank, &donor, settings).unwrap_err().to_string();
    assert!(error.contains("none has trained rows"), "{error}");
}

#[test]
fn simple_methods_are_what_they_say() {
    let root = tempfile::tempdir().unwrap();
    let (own, theirs) = pair();
    let model = save(root.path(), "model", &tiny(1, 360, true, 16), &own);
    let donor = save(root.path(), "donor", &tiny(2, 400, true, 24), &theirs);
    let ours = matrix(&model.checkpoint, EMBEDDING);
    let mean_of = |ids: &[u32]| -> Vec<f64> {
        let column = |j| ids.iter().map(|id| ours[(*id as usize, j)]).sum::<f64>() / ids.len() as f64;
        (0..16).map(column).collect()
    };
    let all: Vec<u32> = (0..360).collect();
    let mut made = Vec::new();
    for (name, method) in TransplantMethod::NAMES {
        assert_eq!((method.name(), name.parse()), (name, Ok(method)));
        let out = transplanted(&model, &donor, settings(method), &root.path().join(name));
        let found = matrix(&Checkpoint::open(&out).unwrap(), EMBEDDING);
        for id in 0..400 {
            let token = theirs.token(id).unwrap();
            let expected = match (own.id(&token), method) {
                (Some(id), _) => ours.row(id as usize).to_vec(),
                (_, TransplantMethod::Zero) => vec![0.0; 16],
                (_, TransplantMethod::Mean) => mean_of(&all),
                // No token of it is a part of a character.
                (_, TransplantMethod::Subword) => {
                    let text = theirs.decode(&[id], false).unwrap();
                    let ids = own.encode(&text, false).unwrap();
                    assert!(ids.len() > 1 && own.decode(&ids, false).unwrap() == text, "{text}");
                    mean_of(&ids)
                }
                _ => continue,
            };
            for (a, b) in expected.iter().zip(found.row(id as usize)) {
                assert!((a - b).abs() < 1e-6, "{name} {token}: {a} {b}");
            }
        }
        made.push(found);
    }
    for (i, a) in made.iter().enumerate() {
        assert!(made[i + 1..].iter().all(|b| a.max_abs_diff(b) > 1e-3), "control: {i}");
    }
    "melt".parse::<TransplantMethod>().unwrap_err();
}

#[test]
fn executors_with_more_threads_write_the_same_bytes() {
    let root = tempfile::tempdir().unwrap();
    let (own, theirs) = pair();
    let model = save(root.path(), "model", &tiny(1, 360, false, 16), &own);
    let donor = save(root.path(), "donor", &tiny(2, 400, false, 24), &theirs);
    let written = |threads, k| {
        let settings = TransplantSettings { k, ..TransplantSettings::default() };
        let transplant = VocabularyTransplant::new(&model, &donor, settings).unwrap();
        let out = root.path().join(format!("{threads}-{k}"));
        let executor = Executor { threads: Some(threads), ..Executor::default() };
        executor.run(&transplant, &transplant.target(&out).unwrap()).unwrap();
        std::fs::read(out.join("model.safetensors")).unwrap()
    };
    assert_eq!(written(1, 8), written(3, 8));
    assert_ne!(written(2, 7), written(2, 8), "control");
}

/// A tokenizer of SentencePiece's kind: bytes as `<0x41>`, spaces as `▁`, one in front of every text.
fn sentencepiece(root: &Path) -> Tokenizer {
    let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>"].map(String::from).to_vec();
    tokens.extend((0..256).map(|b| format!("<0x{b:02X}>")));
    let letters = ["▁", "t", "h", "e", "n", "i", "g"].map(String::from);
    let merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("i", "n"), ("in", "g")];
    tokens.extend(letters);
    tokens.extend(merges.map(|(a, b)| format!("{a}{b}")));
    let vocab: serde_json::Map<String, Value> =
        tokens.into_iter().zip(0u32..).map(|(t, i)| (t, i.into())).collect();
    let word = |id: u32, content: &str| json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true});
    let json = json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [word(0, "<unk>"), word(1, "<s>"), word(2, "</s>")],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ]},
        "pre_tokenizer": null, "post_processor": null,
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
        ]},
        "model": {"type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null, "end_of_word_suffix": null,
            "fuse_unk": true, "byte_fallback": true, "vocab": vocab, "merges": merges.map(|(a, b)| format!("{a} {b}"))},
    });
    std::fs::create_dir_all(root).unwrap();
    std::fs::write(root.join("tokenizer.json"), json.to_string()).unwrap();
    let config = json!({"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"});
    std::fs::write(root.join("tokenizer_config.json"), config.to_string()).unwrap();
    Tokenizer::from_folder(root).unwrap()
}

#[test]
fn tokens_of_other_kinds_meet_by_their_bytes() {
    let root = tempfile::tempdir().unwrap();
    let spm = sentencepiece(&root.path().join("tokenizer"));
    let bytes = with_tokens(&train_bpe([""], 259).unwrap(), &["Ġt", "Ġthe", "ing", "ting", "Ġthing"]);
    let model = save(root.path(), "spm", &tiny(1, spm.vocab_size(), true, 16), &spm);
    let donor = save(root.path(), "bytes", &tiny(2, 264, true, 16), &bytes);
    let subword = settings(TransplantMethod::Subword);
    let out = transplanted(&model, &donor, subword, &root.path().join("out"));
    let (ours, made) =
        (matrix(&model.checkpoint, EMBEDDING), matrix(&Checkpoint::open(&out).unwrap(), EMBEDDING));
    let ours = |token: &str| ours.row(spm.id(token).unwrap() as usize).to_vec();
    let made = |token: &str| made.row(bytes.id(token).unwrap_or_else(|| panic!("{token}")) as usize).to_vec();
    // In one place for both: the mark, bytes of control characters and of parts of characters, letters before their bytes, the end.
    for (theirs, own) in [
        ("Ġthe", "▁the"),
        ("Ġt", "▁t"),
        ("Ċ", "<0x0A>"),
        ("Ġ", "▁"),
        ("t", "t"),
        ("Ã", "<0xC3>"),
        ("ing", "ing"),
    ] {
        assert_eq!(made(theirs), ours(own), "{theirs}");
    }
    assert_eq!(made("<|endoftext|>"), ours("</s>"), "the role");
    assert_ne!(ours("t"), ours("▁t"), "control");
    let mean = |tokens: &[&str]| -> Vec<f64> {
        let rows: Vec<Vec<f64>> = tokens.iter().map(|t| ours(t)).collect();
        (0..16).map(|j| rows.iter().map(|row| row[j]).sum::<f64>() / rows.len() as f64).collect()
    };
    let close = |a: Vec<f64>, b: Vec<f64>| a.iter().zip(&b).all(|(a, b)| (a - b).abs() < 1e-7);
    // Without the space that the model's tokenizer puts in front of a text, and with the one that belongs there.
    assert!(close(made("Ġthing"), mean(&["▁t", "h", "ing"])));
    assert!(close(made("ting"), mean(&["t", "ing"])));
    assert!(!close(made("ting"), mean(&["▁t", "ing"])), "control");

    // The other way: spellings of bytes are those of the byte-level vocabulary.
    let back = transplanted(&donor, &model, subword, &root.path().join("back"));
    let (ours, made) =
        (matrix(&donor.checkpoint, EMBEDDING), matrix(&Checkpoint::open(&back).unwrap(), EMBEDDING));
    for (theirs, own) in
        [("▁the", "Ġthe"), ("<0x0A>", "Ċ"), ("<0x41>", "A"), ("h", "h"), ("</s>", "<|endoftext|>")]
    {
        let [theirs, own] = [spm.id(theirs), bytes.id(own)].map(|id| id.unwrap() as usize);
        assert_eq!(made.row(theirs), ours.row(own));
    }
    let [h, e] = ["h", "e"].map(|token| ours.row(bytes.id(token).unwrap() as usize)[0]);
    assert!((made.row(spm.id("he").unwrap() as usize)[0] - (h + e) / 2.0).abs() < 1e-7);
}

#[test]
fn every_problem_is_listed() {
    let root = tempfile::tempdir().unwrap();
    let (own, theirs) = pair();
    let broken = tiny(1, 360, false, 16);
    let broken = with_rows(&broken, 360, &|rows| rows.iter().map(|v| v * f32::NAN).collect());
    let model = save(root.path(), "model", &broken, &own);
    let donor = save(root.path(), "donor", &tiny(2, 400, true, 24), &theirs);
    let problems = |model: &ModelFiles, donor: &ModelFiles, settings| match VocabularyTransplant::new(
        model, donor, settings,
    )
    .unwrap_err()
    {
        MergeError::Transplant { problems } => problems,
        other => panic!("{other}"),
    };
    let none = TransplantSettings { k: 0, ..TransplantSettings::default() };
    let found = problems(&model, &donor, none);
    assert_eq!(found.len(), 3, "{found:?}");
    for part in ["k is 0", EMBEDDING, HEAD] {
        assert!(found.iter().any(|p| p.contains(part)), "{part} in {found:?}");
    }
    // Control: with zeros nothing is computed from the donor; k has no say.
    let zero = TransplantSettings { k: 0, ..settings(TransplantMethod::Zero) };
    assert_eq!(problems(&model, &donor, zero).len(), 2);
    VocabularyTransplant::new(&donor, &model, zero).unwrap();

    // Words of which none is the same.
    let words = |name: &str, words: &[&str]| {
        let vocab: serde_json::Map<String, Value> =
            words.iter().zip(0u32..).map(|(w, i)| ((*w).into(), i.into())).collect();
        let folder = root.path().join(name).join("tokenizer");
        std::fs::create_dir_all(&folder).unwrap();
        let json = json!({"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel", "vocab": vocab, "unk_token": words[0]}});
        std::fs::write(folder.join("tokenizer.json"), json.to_string()).unwrap();
        let tokenizer = Tokenizer::from_folder(&folder).unwrap();
        save(root.path(), &format!("{name}-model"), &tiny(1, words.len(), true, 16), &tokenizer)
    };
    let (one, other) = (words("one", &["a", "b"]), words("other", &["x", "y", "z"]));
    let found = problems(&one, &other, TransplantSettings::default());
    assert!(found.len() == 1 && found[0].contains("share no token"), "{found:?}");
    VocabularyTransplant::new(&one, &other, settings(TransplantMethod::Mean)).unwrap();
}

/// The model with a part of its rows, and their tokenizer: half of the tokens that no other is merged from are gone.
fn reduced(model: &Model, seed: u64) -> (Decoder, Tokenizer) {
    let tokenizer = &model.tokenizer;
    let json: Value = serde_json::from_slice(&tokenizer.files().unwrap()[0].1).unwrap();
    let used: HashSet<String> = json["model"]["merges"]
        .as_array()
        .unwrap()
        .iter()
        .flat_map(|merge| match merge {
            Value::String(text) => text.split(' ').map(String::from).collect::<Vec<_>>(),
            list => (0..2).map(|i| list[i].as_str().unwrap().to_owned()).collect(),
        })
        .collect();
    let vocab = tokenizer.vocab_size();
    let draws = Seed(seed).uniform("dropped", vocab, 0.5);
    let goes =
        |id: usize| id >= 259 && !used.contains(&tokenizer.token(id as u32).unwrap()) && draws[id] < 0.0;
    let kept: Vec<usize> = (0..vocab).filter(|id| !goes(*id)).collect();
    let mut of = vec![None; vocab];
    kept.iter().zip(0u32..).for_each(|(id, new)| of[*id] = Some(new));
    let width = model.decoder.config().d_model;
    let rows =
        |all: Vec<f32>| kept.iter().flat_map(|id| all[id * width..(id + 1) * width].to_vec()).collect();
    (with_rows(&model.decoder, kept.len(), &rows), renumbered(tokenizer, &of))
}

/// A donor that has seen as much as the model, in a space of half the width: its rows are random projections of the model's, with noise.
fn projected(model: &Model, seed: u64, noise: f64) -> Decoder {
    let weight = model.decoder.weight(Site::global(Part::Embed)).unwrap();
    let [vocab, width] = weight.dims();
    let rows = Matrix::from_f32(vocab, width, &weight.into_data().try_into_vec_as::<f32>().unwrap()).unwrap();
    let mut rows = rows.matmul(&random(width, width / 2, seed, "projection")).unwrap();
    let size = norm(rows.data()) / (rows.data().len() as f64).sqrt();
    let add = random(vocab, width / 2, seed, "noise");
    rows.data_mut().iter_mut().zip(add.data()).for_each(|(r, n)| *r += noise * size * n);
    with_rows(&tiny(seed, vocab, true, width / 2), vocab, &|_| rows.to_f32())
}

fn bits_per_byte(model: &Model, text: &str) -> f64 {
    let ids = model.tokenizer.encode(text, false).unwrap();
    let report = perplexity(&model.decoder, &[], &ids, text.len(), 128, 4, &Silent).unwrap();
    report.bits_per_byte.unwrap()
}

/// Half of the tokens that no merge needs are taken from the embedded model and given back, three draws of which: from a donor in its
/// own space, and from one in a noisy space of half the width.
#[test]
fn lost_tokens_come_back() {
    let root = tempfile::tempdir().unwrap();
    let device = Device::flex();
    let model = Model::embedded(&device).unwrap();
    let text: String = domain("prose").unwrap().held_out_text().chars().take(3000).collect();
    let whole = bits_per_byte(&model, &text);
    let own = ModelFiles::embedded().unwrap();
    for seed in 0..3 {
        let dir = root.path().join(seed.to_string());
        let (less, tokenizer) = reduced(&model, seed);
        let files = save(&dir, "less", &less, &tokenizer);
        let without = bits_per_byte(&Model { name: "less".into(), decoder: less, tokenizer }, &text);
        let other = save(&dir, "other", &projected(&model, seed, 0.3), &model.tokenizer);
        let bits = |donor: &ModelFiles, method: TransplantMethod| {
            let out = dir.join(format!("{}-{}", donor.name, method.name()));
            let out = transplanted(&files, donor, settings(method), &out);
            bits_per_byte(&Model::open(&out, &device).unwrap(), &text)
        };
        let plain = [TransplantMethod::Subword, TransplantMethod::Mean, TransplantMethod::Zero];
        let [subword, mean, zero] = plain.map(|method| bits(&own, method));
        let fitted = [&own, &other].map(|donor| {
            [TransplantMethod::Omp, TransplantMethod::CommonInterpolation].map(|method| bits(donor, method))
        });
        let says = format!(
            "seed {seed}: bits per byte {whole:.4} whole, {without:.4} without the tokens; subword {subword:.4}, \
             mean {mean:.4}, zero {zero:.4}; omp and common_interpolation {:.4?} by its own rows, {:.4?} by others",
            fitted[0], fitted[1]
        );
        println!("{says}");
        let [[omp, near], [omp_by_others, _]] = fitted;
        assert!(omp < whole + 0.01 && omp < near, "{says}");
        assert!([subword, mean, zero, without].iter().all(|bits| omp_by_others < *bits - 0.05), "{says}");
    }
}
