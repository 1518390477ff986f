//! Documents packed into a row are computed as if each were alone.

use burn::module::Module;
use burn::optim::GradientsParams;
use burn::tensor::{Device, Tensor};
use firebrick_core::{Run, Seed};
use firebrick_models::Decoder;
use firebrick_train::{Average, Batch, Document, Rows, Wired, recompute, token_tensor};

use crate::tiny::{VOCAB, decoder, far, gradients, noise, trainable};

/// Documents of these lengths, of whose tokens every third is only read.
fn documents(lengths: &[usize]) -> Vec<Document> {
    let ids = noise(lengths.iter().sum()).ids;
    let mut from = 0;
    let document = |&length: &usize| {
        from += length;
        let learn = (0..length).map(|i| i % 3 != 2).collect();
        Document { ids: ids[from - length..from].to_vec(), learn, bytes: length }
    };
    lengths.iter().map(document).collect()
}

fn pack(documents: &[Document], average: Average) -> Rows<'static> {
    Rows::pack(documents, 16, VOCAB - 1, average).unwrap()
}

fn whole(rows: &Rows, device: &Device) -> Batch {
    rows.batch(&(0..rows.count()).collect::<Vec<_>>(), device)
}

/// The nats of each token from the second on of a document alone.
fn alone(decoder: &Decoder, document: &Document) -> Tensor<2> {
    decoder.nll(token_tensor(&[&document.ids], &decoder.device()), &mut Run::default())
}

fn list(x: Tensor<2>) -> Vec<f64> {
    x.into_data().iter::<f64>().collect()
}

#[test]
fn every_token_is_predicted_as_in_a_row_of_its_own() {
    let decoder = decoder(&Device::flex());
    let documents = documents(&[9, 7, 5, 5, 6, 3, 13]);
    let rows = pack(&documents, Average::Token);
    assert_eq!((rows.count(), rows.padding()), (3, 0.0));
    let batch = whole(&rows, &Device::flex());
    let packed = list(batch.each(&decoder, &mut Run::default()));
    // Longest first, each into the fullest row that has room.
    let order = [vec![6, 5], vec![0, 1], vec![4, 2, 3]];
    let (mut compared, mut largest) = (0, 0f64);
    for (row, order) in order.iter().enumerate() {
        let mut at = row * 15;
        for &document in order {
            let alone = list(alone(&decoder, &documents[document]));
            for (i, want) in alone.iter().enumerate() {
                largest = largest.max((packed[at + i] - want).abs());
            }
            compared += alone.len();
            // The first token of the next document is predicted by nobody.
            at += alone.len() + 1;
        }
    }
    assert_eq!(compared, 48 - 7);
    println!("largest difference of a token's nats: {largest:e}");
    assert!(largest < 1e-5);

    let plain = Batch { segments: None, ..batch };
    let plain = list(plain.each(&decoder, &mut Run::default()));
    let differs = packed.iter().zip(&plain).filter(|(a, b)| (*a - *b).abs() > 1e-4).count();
    // Of the 48 tokens 16 come second or later in a document that is not the first of its row.
    assert!(differs >= 16, "control: documents that see each other differ at {differs} tokens");
    assert_eq!(packed[..12], plain[..12], "up to the end of the first document nothing changes");
}

#[test]
fn gradients_are_those_of_the_documents_alone() {
    let model = trainable();
    let documents = documents(&[9, 7, 5, 5, 6, 3, 12]);
    let of = |loss: Tensor<1>| {
        let found = GradientsParams::from_grads(loss.backward(), &model);
        gradients(&model, &found)
    };
    for average in [Average::Token, Average::Document] {
        let rows = pack(&documents, average);
        assert!(rows.padding() > 0.0);
        let device = Device::flex().autodiff();
        let batch = whole(&rows, &device);
        let loss = batch.nll(&model, &mut Run::default());
        // What the loss means, document by document.
        let learned: usize = documents.iter().map(Document::learned).sum();
        let share = |document: &Document| match average {
            Average::Token => 1.0 / learned as f64,
            Average::Document => 1.0 / (documents.len() * document.learned()) as f64,
        };
        let alone = documents.iter().map(|document| {
            let weights: Vec<f64> =
                document.learn[1..].iter().map(|&l| if l { share(document) } else { 0.0 }).collect();
            let n = weights.len();
            let weights = Tensor::<1>::from_floats(weights.as_slice(), &device).reshape([1, n]);
            (alone(&model, document) * weights).sum()
        });
        let alone = alone.reduce(|a, b| a + b).unwrap();
        let difference = (loss.clone().inner() - alone.clone().inner()).into_scalar::<f32>().abs();
        assert!(difference < 1e-5, "{difference}");
        let (packed, alone) = (of(loss), of(alone));
        println!("{average:?}: gradients differ by {:e} of the largest", far(&packed, &alone));
        assert!(far(&packed, &alone) < 1e-5);
        let plain = Batch { segments: None, ..batch };
        let plain = of(plain.nll(&model, &mut Run::default()));
        assert!(far(&plain, &alone) > 1e-3, "control: documents that see each other");
    }
}

#[test]
fn what_is_masked_or_elsewhere_changes_nothing() {
    let decoder = decoder(&Device::flex());
    let start = documents(&[9, 7]);
    let each = |documents: &[Document]| {
        let batch = whole(&pack(documents, Average::Token), &Device::flex());
        (
            list(batch.each(&decoder, &mut Run::default())),
            batch.nll(&decoder, &mut Run::default()).into_scalar::<f32>(),
        )
    };
    let (nats, loss) = each(&start);
    // Another mask: the same nats, another loss.
    let mut other = start.clone();
    other[1].learn[4] = false;
    assert_eq!(each(&other).0, nats);
    assert_ne!(each(&other).1, loss);
    // Another first document: the second keeps its nats bit for bit.
    let mut other = start.clone();
    other[0].ids[3] = (other[0].ids[3] + 1) % VOCAB;
    assert_eq!(each(&other).0[9..], nats[9..]);
    assert_ne!(each(&other).0[..8], nats[..8]);
    // A last token that is not learned: the same loss bit for bit.
    let mut other = start.clone();
    other[0].ids[8] = (other[0].ids[8] + 1) % VOCAB;
    assert!(!start[0].learn[8]);
    assert_eq!(each(&other).1, loss);
}

fn bare(decoder: &Decoder) -> Wired<'_> {
    Wired { decoder, bricks: &[] }
}

#[test]
fn gradients_block_by_block_are_those_of_the_whole() {
    let device = Device::flex().autodiff();
    let rows = pack(&documents(&[9, 7, 5, 5, 6, 3, 12]), Average::Token);
    let text = noise(64);
    let windows = Rows::windows(&text, 16).unwrap();
    for (name, rows) in [("packed", &rows), ("windows", &windows)] {
        let model = trainable();
        let batch = whole(rows, &device);
        let loss = batch.nll(&model, &mut Run::default()) / 2.0;
        let found = GradientsParams::from_grads(loss.clone().backward(), &model);
        let want = gradients(&model, &found);
        let untracked = model.clone().no_grad();
        let of = |passes| recompute(bare(&model), bare(&untracked), &model, &batch, Seed(0), passes);
        let (value, found) = of(2).unwrap();
        let got = gradients(&model, &found);
        println!("{name}: gradients differ by {:e} of the largest", far(&got, &want));
        assert_eq!(got.len(), want.len());
        assert!(far(&got, &want) < 1e-6);
        assert_eq!(value.into_scalar::<f32>(), loss.inner().into_scalar::<f32>());
        let (_, halves) = of(1).unwrap();
        assert!(far(&gradients(&model, &halves), &want) > 0.1, "control: the number of passes counts");
    }
    let frozen = decoder(&device);
    let (frozen, batch) = (&frozen, whole(&windows, &device));
    assert!(recompute(bare(frozen), bare(frozen), frozen, &batch, Seed(0), 1).is_none());
}
