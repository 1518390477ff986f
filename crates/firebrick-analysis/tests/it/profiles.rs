use std::cell::RefCell;

use firebrick_analysis::{
    AnalysisError, ExpertUsage, Item, Metric, Profile, ProfileOptions, Report, SecondMoments,
    SimilarityOptions, cka, layer_grams, profile, profile_with,
};
use firebrick_core::{Base, Brick, Cancelled, Event, Part, Progress, Run, Seed, Silent, Site, SiteSet};
use firebrick_models::Decoder;

use burn::tensor::{Device, Int, Tensor, TensorData};

use crate::{decoder, ids, measured, on_threads, options};

fn without_output(decoder: Decoder, layer: usize, parts: &[Part]) -> Decoder {
    parts.iter().fold(decoder, |decoder, part| {
        let site = Site::layer(layer, *part);
        let zero = decoder.weight(site).unwrap().zeros_like();
        decoder.with_weight(site, zero)
    })
}

#[test]
fn a_block_that_adds_nothing_has_no_influence_and_comes_first() {
    let intact = measured(&decoder());
    // Control: intact, this layer comes last.
    let layer = intact.least_influential(Part::Block)[3].layer.unwrap();
    assert!(intact.residual.iter().all(|r| r.influence.mean > 1e-6 && r.influence.error > 0.0));

    let profile = measured(&without_output(decoder(), layer, &[Part::AttnO, Part::MlpDown]));
    for part in [Part::Block, Part::AttnSublayer, Part::MlpSublayer] {
        let site = Site::layer(layer, part);
        let found = profile.residual_at(site).unwrap();
        assert_eq!((found.influence.mean, found.influence.error, found.update.mean), (0.0, 0.0, 0.0));
        assert_eq!(profile.least_influential(part)[0], site);
    }
    assert_eq!(profile.residual.iter().filter(|r| r.influence.mean == 0.0).count(), 3);

    // Only attention gone: the block still acts through its other half.
    let half = measured(&without_output(decoder(), layer, &[Part::AttnO]));
    assert_eq!(half.residual_at(Site::layer(layer, Part::AttnSublayer)).unwrap().influence.mean, 0.0);
    assert!(half.residual_at(Site::layer(layer, Part::Block)).unwrap().influence.mean > 0.0);
}

/// The profile's pass block by block against one pass of the whole model, in plain f64 loops.
#[test]
fn numbers_are_those_of_the_definition() {
    let decoder = decoder();
    let options = ProfileOptions { max_windows: 100, ..options() };
    let ids = ids(24 * 3);
    let profile = profile(&decoder, &ids, &options, &Silent).unwrap();
    assert_eq!((profile.windows, profile.tokens), (3, 3 * 23));

    let site = Site::layer(1, Part::MlpDown);
    let block = Site::layer(1, Part::Block);
    let tap = firebrick_core::Tap { sites: [site, block].into_iter().collect() };
    let data = TensorData::new(ids.iter().map(|i| *i as i32).collect::<Vec<_>>(), [3, 24]);
    let bricks: [&dyn Brick; 1] = [&tap];
    let mut run = Run::new(&bricks);
    decoder.hidden(Tensor::<2, Int>::from_data(data, &Device::flex()), &mut run);
    let seen = &run.state::<firebrick_core::Taps>().seen;
    let rows = |at: Site, output: bool| -> Vec<Vec<f64>> {
        let (_, x, y) = seen.iter().find(|s| s.0 == at).unwrap();
        let t = if output { y } else { x };
        let d = t.dims()[2];
        let values: Vec<f32> = t.clone().into_data().try_into_vec().unwrap();
        let all = values.chunks(d).map(|r| r.iter().map(|v| f64::from(*v)).collect());
        // Without the first token of each window.
        all.enumerate().filter(|(i, _)| i % 24 != 0).map(|(_, r)| r).collect()
    };
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let mean = |values: Vec<f64>| values.iter().sum::<f64>() / values.len() as f64;

    let (x, y) = (rows(block, false), rows(block, true));
    let cosine = |(a, b): (&Vec<f64>, &Vec<f64>)| 1.0 - dot(a, b) / (dot(a, a) * dot(b, b)).sqrt();
    let influence = mean(x.iter().zip(&y).map(cosine).collect());
    let found = profile.residual_at(block).unwrap();
    assert!((found.influence.mean - influence).abs() < 1e-6 * influence.max(1e-2), "{found:?} {influence}");

    let linear = profile.linear_at(site).unwrap();
    let input = mean(rows(site, false).iter().map(|r| dot(r, r)).collect());
    let output = mean(rows(site, true).iter().map(|r| dot(r, r)).collect());
    assert!((linear.input_energy / input - 1.0).abs() < 1e-4);
    assert!((linear.output_energy / output - 1.0).abs() < 1e-4, "{} {output}", linear.output_energy);
    // Negative control: with the first tokens it is another number.
    let with_first = ProfileOptions { skip_first_token: false, ..options };
    let other = firebrick_analysis::profile(&decoder, &ids, &with_first, &Silent).unwrap();
    assert!((other.linear_at(site).unwrap().input_energy / input - 1.0).abs() > 1e-4);
}

#[test]
fn sensitivities_and_tails_fall_and_ranks_are_ordered() {
    let profile = measured(&decoder());
    assert_eq!(profile.linear.len(), 4 * 7);
    for l in &profile.linear {
        assert_eq!(l.bits.iter().map(|b| b.bits).collect::<Vec<_>>(), [2, 3, 4, 8]);
        assert!(l.bits.windows(2).all(|w| w[1].error < w[0].error && w[1].size > w[0].size), "{l:?}");
        assert!(l.gradient_energy > 0.0 && l.bits.windows(2).all(|w| w[1].rise < w[0].rise), "{l:?}");
        assert!(l.bits[3].relative > 0.0 && l.bits[3].relative < 1e-3);
        assert_eq!((l.ranks[0].rank, l.ranks[0].relative), (0, 1.0));
        assert!(l.ranks.windows(2).all(|w| w[1].error < w[0].error));
        assert!(l.ranks.iter().all(|r| r.rank <= l.d_in.min(l.d_out)));
        assert!(1.0 <= l.participation_ratio && l.participation_ratio <= l.activation_rank);
        assert!(l.activation_rank <= l.d_in as f64 + 1e-9);
        assert!(1.0 <= l.stable_rank && l.stable_rank <= l.d_in.min(l.d_out) as f64);
    }
    // q, k and v read the same input.
    let at = |part| profile.linear_at(Site::layer(0, part)).unwrap();
    assert_eq!(at(Part::AttnQ).activation_rank, at(Part::AttnV).activation_rank);
    assert_ne!(at(Part::AttnQ).activation_rank, at(Part::AttnO).activation_rank);
    assert!(profile.weight_skew.max_over_median > 1.1 && profile.weight_skew.gini > 0.05);
}

#[test]
fn the_same_profile_on_any_number_of_threads() {
    let decoder = decoder();
    let one = on_threads(1, || measured(&decoder));
    let three = on_threads(3, || measured(&decoder));
    assert_eq!(one.to_json().unwrap(), three.to_json().unwrap());
    let other =
        profile(&decoder, &ids(200), &ProfileOptions { seed: Seed(3), ..options() }, &Silent).unwrap();
    assert_ne!(one.residual, other.residual, "control: another seed draws other windows");
}

#[test]
fn json_comes_back_and_other_versions_do_not() {
    let profile = measured(&decoder());
    let text = profile.to_json().unwrap();
    assert_eq!(Profile::from_json(&text).unwrap(), profile);
    let newer = text.replacen("\"version\": 1", "\"version\": 7", 1);
    assert!(matches!(Profile::from_json(&newer), Err(AnalysisError::Version { found: 7, .. })));
    assert!(matches!(Profile::from_json("{\"version\": 1}"), Err(AnalysisError::Json(_))));
    assert!(matches!(Report::from_json("{\"version\": 2}"), Err(AnalysisError::Version { found: 2, .. })));
    for layers in ["3", "5", "18446744073709551615"] {
        let wrong = text.replacen("\"layers\": 4", &format!("\"layers\": {layers}"), 1);
        assert_ne!(wrong, text);
        let error = Profile::from_json(&wrong).unwrap_err();
        assert!(
            matches!(error, AnalysisError::Json(_)) && error.to_string().contains("sites of 4"),
            "{error}"
        );
    }

    let report = Report::new("profile").sections(profile.sections());
    assert_eq!(Report::from_json(&report.to_json().unwrap()).unwrap(), report);
    let folder = std::env::temp_dir().join(format!("firebrick-report-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    report.save(&folder).unwrap();
    let html = std::fs::read_to_string(folder.join("report.html")).unwrap();
    assert_eq!(html, report.to_html());
    profile.save(folder.join("profile.json")).unwrap();
    assert_eq!(Profile::load(folder.join("profile.json")).unwrap(), profile);
    std::fs::remove_dir_all(&folder).unwrap();
    assert!(matches!(Profile::load(folder.join("profile.json")), Err(AnalysisError::Io { .. })));
    for site in ["layers.3.mlp.down", "layers.0.attn.q"] {
        assert!(html.contains(site));
    }
}

struct Stop;
impl Progress for Stop {
    fn on(&self, _: Event<'_>) {}
    fn cancelled(&self) -> bool {
        true
    }
}

#[test]
fn wrong_input_is_a_typed_error() {
    let decoder = decoder();
    let run = |ids: &[u32], options: ProfileOptions| profile(&decoder, ids, &options, &Silent);
    assert!(matches!(run(&[1], options()), Err(AnalysisError::TooFewTokens { have: 1, need: 2 })));
    assert!(run(&[1, 2], options()).is_ok());
    let outside = run(&[1, 64, 3, 99], options());
    assert!(matches!(outside, Err(AnalysisError::Tokens { count: 2, id: 64, position: 1, vocab: 64 })));
    let wrong = ProfileOptions { bits: vec![1, 4, 9], batch: 0, ..options() };
    let Err(AnalysisError::Options { problems }) = run(&ids(50), wrong) else { panic!("accepted") };
    assert_eq!(problems.len(), 3, "{problems:?}");
    let stopped = profile(&decoder, &ids(50), &options(), &Stop);
    assert!(matches!(stopped, Err(AnalysisError::Cancelled(Cancelled))));
    let site = Site::layer(1, Part::MlpUp);
    let broken = decoder.clone().with_weight(site, decoder.weight(site).unwrap() * f32::NAN);
    let error = profile(&broken, &ids(50), &options(), &Silent).unwrap_err();
    assert!(error.to_string().starts_with("layers.1."), "{error}");
}

#[test]
fn moments_can_leave_out_the_first_tokens() {
    let site = Site::layer(0, Part::AttnK);
    let sites: SiteSet = [site].into_iter().collect();
    let sums = |skip: usize, tokens: usize| {
        let moments = SecondMoments::new(&sites).skipping(skip);
        let x = Tensor::<3>::ones([2, tokens, 3], &Device::flex());
        Run::new(&[&moments]).at(Site::layer(0, Part::AttnQ), x, &mut |x, _| x);
        moments.matrix(site).ok().map(|m| m[(0, 2)])
    };
    assert_eq!(sums(0, 5), Some(10.0));
    assert_eq!(sums(2, 5), Some(6.0));
    assert_eq!(sums(5, 5), None);
}

#[test]
fn one_pass_gives_every_metric_and_each_is_what_its_own_function_says() {
    let decoder = decoder();
    let profile = measured(&decoder);
    assert_eq!((profile.attention.len(), profile.activation.len()), (4, 4));
    for a in &profile.attention {
        assert!(a.entropy.mean > 0.0 && a.entropy.mean < 1.0 && a.entropy.error > 0.0, "{a:?}");
        assert!(a.sink.mean > 0.0 && a.sink.mean < 1.0 && a.distance.mean > 0.0 && a.heads.len() == 4);
        assert!(a.disagreement.mean > 0.0 && a.disagreement.mean < 1.0);
    }
    for a in &profile.activation {
        assert!(
            a.neurons == 48 && a.hoyer > 0.0 && a.active > 0.0 && a.active < 0.95 && a.dead == 0,
            "{a:?}"
        );
        assert!(a.dropped.windows(2).all(|d| d[0].error < d[1].error) && a.partition.is_some());
    }
    let similarity = profile.similarity.as_ref().unwrap();
    assert!(
        (0..5).all(|i| (similarity.cka[i][i].unwrap() - 1.0).abs() < 1e-9 && similarity.cka[i].len() == 5)
    );
    assert!(similarity.cka[0][4].unwrap() < 0.9, "the ends differ");
    let lens = profile.lens.as_ref().unwrap();
    assert_eq!((lens.layers.len(), lens.layers[4].agreement), (5, 1.0));
    assert!(lens.layers[4].kl.abs() < 1e-6 && lens.layers[0].kl > 1e-3);
    assert!(profile.fisher.is_empty() && profile.hessian.is_empty() && profile.experts.is_empty());

    // The same numbers when each is measured alone; nothing else is there.
    for metric in Metric::one_pass() {
        let options = ProfileOptions { metrics: [metric].into(), ..options() };
        let alone = firebrick_analysis::profile(&decoder, &ids(200), &options, &Silent).unwrap();
        assert_eq!(alone.residual, profile.residual);
        assert_eq!(alone.linear.is_empty(), metric != Metric::Linear);
        match metric {
            Metric::Linear => assert_eq!(alone.linear, profile.linear),
            Metric::Attention => assert_eq!(alone.attention, profile.attention),
            Metric::Similarity => assert_eq!(alone.similarity, profile.similarity),
            Metric::Lens => assert_eq!(alone.lens, profile.lens),
            _ => assert_eq!(alone.activation[2].partition, profile.activation[2].partition),
        }
        assert_eq!(Profile::from_json(&alone.to_json().unwrap()).unwrap(), alone);
    }
}

/// The update `delta: [d_in, d_out]` of the weight at one site, in activation space.
struct Update {
    sites: SiteSet,
    delta: Tensor<2>,
}

impl Brick for Update {
    fn sites(&self) -> &SiteSet {
        &self.sites
    }

    fn at(&self, _: Site, x: Tensor<3>, base: &mut Base<'_>, run: &mut Run<'_>) -> Tensor<3> {
        base(x.clone(), run) + x.matmul(self.delta.clone().unsqueeze_dim(0))
    }
}

/// Notes where it was called, and whether the run still has what was left in it at the embedding.
struct Log {
    sites: SiteSet,
    seen: RefCell<Vec<(Site, Option<usize>)>>,
}

impl Brick for Log {
    fn sites(&self) -> &SiteSet {
        &self.sites
    }

    fn at(&self, site: Site, x: Tensor<3>, base: &mut Base<'_>, run: &mut Run<'_>) -> Tensor<3> {
        if site.part == Part::Embed {
            run.insert(self.seen.borrow().len());
        }
        self.seen.borrow_mut().push((site, run.get::<usize>().copied()));
        base(x, run)
    }
}

#[test]
fn bricks_are_in_force_and_taps_see_one_pass() {
    let (decoder, device) = (decoder(), Device::flex());
    let site = Site::layer(1, Part::MlpDown);
    let delta = TensorData::new(Seed(4).normal("delta", 48 * 32, 0.2), [48, 32]);
    let update = Update { sites: [site].into_iter().collect(), delta: Tensor::from_data(delta, &device) };
    let blocks = decoder.sites().all().filter(|s| matches!(s.part, Part::Block | Part::Embed));
    let log = Log { sites: blocks, seen: RefCell::default() };
    let with = |bricks: &[&dyn Brick], taps: &[&dyn Brick], options: &ProfileOptions| {
        profile_with(&decoder, bricks, taps, &ids(200), options, &Silent)
    };
    let found = with(&[&update], &[&log], &options()).unwrap();

    // Two batches, each in a run of its own from the embedding to the last block; the passes for gradients are not among them.
    let embed = Site::global(Part::Embed);
    let mut expected = vec![(embed, Some(0)), (embed, Some(1))];
    expected.extend((0..4).flat_map(|l| (0..2).map(move |batch| (Site::layer(l, Part::Block), Some(batch)))));
    assert_eq!(*log.seen.borrow(), expected);

    // As the model that has the update in its weight.
    let weight = decoder.weight(site).unwrap() + update.delta.clone().transpose();
    let merged = measured(&decoder.clone().with_weight(site, weight));
    let plain = measured(&decoder);
    let lens = |p: &Profile| p.lens.as_ref().unwrap().layers[4].nll;
    let gap = |a: f64, b: f64| (a / b - 1.0).abs();
    let far = |p: &Profile| {
        let pairs =
            found.residual.iter().zip(&p.residual).map(|(a, b)| gap(a.influence.mean, b.influence.mean));
        let gradients =
            found.linear.iter().zip(&p.linear).map(|(a, b)| gap(a.gradient_energy, b.gradient_energy));
        pairs.chain(gradients).chain([gap(lens(&found), lens(p))]).fold(0.0, f64::max)
    };
    assert!(far(&merged) < 1e-3, "{}", far(&merged));
    assert!(far(&plain) > 0.05, "control: the update is felt, {}", far(&plain));
    assert_eq!(with(&[], &[&log], &options()).unwrap(), plain, "taps change nothing");

    let head = Update { sites: [Site::global(Part::Head)].into_iter().collect(), ..update };
    let metrics = [Metric::Fisher, Metric::Hessian, Metric::Lens].into();
    let Err(AnalysisError::Options { problems }) =
        with(&[&head], &[], &ProfileOptions { metrics, ..options() })
    else {
        panic!("accepted")
    };
    assert_eq!(problems.len(), 3, "{problems:?}");
}

#[test]
fn curvature_takes_passes_of_its_own() {
    let decoder = decoder();
    let options = ProfileOptions {
        metrics: [Metric::Fisher, Metric::Hessian].into(),
        directions: 2,
        gradient_windows: 2,
        ..options()
    };
    let mut found = profile(&decoder, &ids(200), &options, &Silent).unwrap();
    assert_eq!((found.fisher.len(), found.hessian.len(), found.linear.len()), (28, 28, 0));
    assert!(found.fisher.iter().all(|f| f.trace.mean > 0.0 && f.trace.error > 0.0));
    assert!(found.hessian.iter().all(|h| h.trace.mean.is_finite() && h.parameters > 0));
    let mut usage = ExpertUsage::new(4, 2);
    usage.add(&[0, 1, 1, 2]).unwrap();
    found.experts.push(usage.profile(2));
    assert_eq!(Profile::from_json(&found.to_json().unwrap()).unwrap(), found);
    let html = Report::new("curvature").sections(found.sections()).to_html();
    for title in ["Curvature of the loss", "Experts"] {
        assert!(html.contains(&format!("<h2>{title}</h2>")), "{title}");
    }
    // A file whose parts do not fit together names every one that does not.
    found.experts[0].layer = 9;
    found.fisher[0].site = Site::layer(7, Part::AttnQ);
    let error = Profile::from_json(&found.to_json().unwrap()).unwrap_err().to_string();
    assert!(error.contains("layers.7.attn.q") && error.contains("experts of layer 9"), "{error}");
}

#[test]
fn reports_show_every_metric_and_two_profiles_side_by_side() {
    let decoder = decoder();
    let before = measured(&decoder);
    let site = Site::layer(2, Part::MlpDown);
    let changed = decoder.clone().with_weight(site, decoder.weight(site).unwrap() * 3.0);
    let after = measured(&changed);
    let report = Report::new("both").sections(after.sections()).section(after.change_section(&before));
    let html = report.to_html();
    for title in
        ["Attention", "Neurons", "Similarity of layers", "Logit lens", "Before and after", "Linear layers"]
    {
        assert!(html.contains(&format!("<h2>{title}</h2>")), "{title}");
    }
    assert_eq!(Report::from_json(&report.to_json().unwrap()).unwrap(), report);
    let Some(Item::Heatmap(map)) =
        after.change_section(&before).items.into_iter().find(|i| matches!(i, Item::Heatmap(_)))
    else {
        panic!("no heat map of changes")
    };
    let influence = &map.rows[0].values;
    assert_eq!(influence[..2], [Some(1.0), Some(1.0)], "layers before the change are as they were");
    assert!((influence[2].unwrap() - 1.0).abs() > 0.05, "the changed one is not: {influence:?}");
    let shallow = measured(&decoder.clone().with_layers(&[0, 1]));
    assert!(matches!(after.change_section(&shallow).items[..], [Item::Note(_)]));

    // Two models: each layer is most like itself, and the first layers are those of both.
    let options =
        SimilarityOptions { window: 24, windows: 4, tokens: 64, batches: 2, skip_first_token: true };
    let grams = |d: &Decoder| layer_grams(d, &ids(200), &options, &Silent).unwrap();
    let found = cka(&grams(&decoder), &grams(&changed)).unwrap().cka;
    assert!((0..3).all(|l| (found[l][l].unwrap() - 1.0).abs() < 1e-6), "{found:?}");
    assert!(found[3][3].unwrap() < 0.999, "{found:?}");
    assert_eq!(cka(&grams(&decoder), &grams(&decoder)).unwrap().batches, 2);
}
