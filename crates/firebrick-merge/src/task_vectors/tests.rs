use super::*;
use firebrick_core::{Part, Seed};

const SEEDS: [u64; 3] = [0, 1, 2];

fn q(layer: usize) -> Site {
    Site::layer(layer, Part::AttnQ)
}

fn random(seed: u64, name: &str) -> TaskVector {
    let draw =
        |rows, cols, what: &str| Matrix::random_normal(rows, cols, Seed(seed), &format!("{name}/{what}"));
    let sites = [
        (q(0), draw(6, 9, "q0")),
        (q(1), draw(9, 6, "q1")),
        (Site::layer(1, Part::MlpNorm), draw(1, 6, "norm")),
    ];
    TaskVector { sites: sites.into() }
}

fn apart(a: &TaskVector, b: &TaskVector) -> f64 {
    assert!(check_same(&[a, b]).is_ok());
    a.sites.values().zip(b.sites.values()).map(|(a, b)| a.max_abs_diff(b)).fold(0.0, f64::max)
}

#[test]
fn one_task_comes_back_and_another_does_not() {
    for seed in SEEDS {
        let (one, other) = (random(seed, "a"), random(seed, "b"));
        let grams: InputGram = [(q(0), Matrix::identity(9)), (q(1), Matrix::identity(6))].into();
        let alone = std::slice::from_ref(&one);
        let flat = TaskVector {
            sites: one.sites.iter().map(|(s, m)| (*s, Matrix::zeros(m.rows(), m.cols()))).collect(),
        };
        for merged in [
            tsv(alone).unwrap(),
            wudi(alone, 20, 1e-3).unwrap(),
            emr(alone).unwrap().task(0).unwrap(),
            fisher(alone, &[flat], FisherNorm::Off).unwrap(),
            regmean(alone, &[grams], 0.9).unwrap(),
            one.low_rank(|_, m| m.rows().min(m.cols())).unwrap().rebuild(),
            lines(one.clone(), 2, 1.0, 1.0),
        ] {
            assert!(apart(&merged, &one) < 1e-5);
            assert!(apart(&merged, &other) > 0.1);
        }
        assert!(apart(&one.low_rank(|_, _| 2).unwrap().rebuild(), &one) > 0.1, "low rank loses something");
    }
}

#[test]
fn the_fine_tune_is_base_plus_difference_and_misfits_are_all_listed() {
    let (base, tuned) = (random(0, "base"), random(0, "tuned"));
    let task = TaskVector::between(&base, &tuned).unwrap();
    assert!(apart(&base.plus(&task, 1.0).unwrap(), &tuned) < 1e-12);
    assert!(apart(&base.plus(&task.clone().times(0.5), 1.0).unwrap(), &tuned) > 0.1);
    assert_eq!(task.low_rank(|_, _| 2).unwrap().numbers(), 2 * (6 + 9) * 2 + 6);
    let mut bad = tuned.clone();
    bad.sites.remove(&q(0));
    bad.sites.insert(q(1), Matrix::zeros(2, 2));
    let error = tsv(&[tuned, bad]).unwrap_err();
    assert!(matches!(&error, TaskVectorError::Mismatch { problems } if problems.len() == 2), "{error}");
    assert!(tsv(&[]).is_err());
}

#[test]
fn regmean_is_least_squares_and_the_average_for_equal_grams() {
    for seed in SEEDS {
        let models = [random(seed, "a"), random(seed, "b")];
        let average = models[0].plus(&models[1], 1.0).unwrap().times(0.5);
        let equal: InputGram = [(q(0), Matrix::identity(9)), (q(1), Matrix::identity(6))].into();
        assert!(apart(&regmean(&models, &[equal.clone(), equal], 1.0).unwrap(), &average) < 1e-10);
        let inputs = [0, 1].map(|m| Matrix::random_normal(30, 9, Seed(seed), &format!("x{m}")));
        let grams = inputs.clone().map(|x| InputGram::from([(q(0), x.transpose().matmul(&x).unwrap())]));
        let merged = regmean(&models, &grams, 1.0).unwrap();
        // At the minimum of the squared error its gradient, sum of (W - W_m) X^T X, is zero.
        let slope = |w: &TaskVector| {
            let mut total = Matrix::zeros(6, 9);
            for (model, gram) in models.iter().zip(&grams) {
                let mut gap = w.sites[&q(0)].clone();
                add(&mut gap, &model.sites[&q(0)], -1.0);
                add(&mut total, &gap.matmul(&gram[&q(0)]).unwrap(), 1.0);
            }
            norm(&total)
        };
        assert!(slope(&merged) < 1e-9);
        assert!(slope(&average) > 1.0);
        assert!(merged.sites[&q(1)].max_abs_diff(&average.sites[&q(1)]) < 1e-12, "no Gram, so the average");
    }
}

#[test]
fn fisher_joins_two_halves_of_a_regression() {
    // Least squares with one-hot inputs: the Hessian is diagonal, and Fisher merging of two fits is the fit of all the data.
    for seed in SEEDS {
        let counts = [[40.0, 1.0, 7.0], [2.0, 30.0, 7.0]];
        let means = [0, 1].map(|m| Matrix::random_normal(1, 3, Seed(seed), &format!("m{m}")));
        let wrap = |m: Matrix| TaskVector { sites: [(q(0), m)].into() };
        let fishers = counts.map(|c| wrap(Matrix::new(1, 3, c.to_vec()).unwrap()));
        let joint = Matrix::from_fn(1, 3, |_, j| {
            let total = counts[0][j] + counts[1][j];
            (counts[0][j] * means[0][(0, j)] + counts[1][j] * means[1][(0, j)]) / total
        });
        let models = means.map(wrap);
        let merged = fisher(&models, &fishers, FisherNorm::Off).unwrap();
        assert!(apart(&merged, &wrap(joint.clone())) < 1e-5);
        let average = models[0].plus(&models[1], 1.0).unwrap().times(0.5);
        assert!(apart(&average, &wrap(joint)) > 1e-2);
        // Unit norm takes out the scale of a diagonal.
        let louder = [fishers[0].clone().times(1e4), fishers[1].clone()];
        let unit = |f: &[TaskVector]| fisher(&models, f, FisherNorm::Unit).unwrap();
        // One that knows nothing has no say; where none knows anything all have the same.
        let nothing = fishers[0].clone().times(0.0);
        assert!(apart(&unit(&[nothing.clone(), fishers[1].clone()]), &models[1]) < 1e-4);
        let mean = models[0].plus(&models[1], 1.0).unwrap().times(0.5);
        assert!(apart(&unit(&[nothing.clone(), nothing]), &mean) < 1e-6);
        assert!(apart(&unit(&louder), &unit(&fishers)) < 1e-4);
        assert!(apart(&fisher(&models, &louder, FisherNorm::Off).unwrap(), &merged) > 1e-2);
        assert!(
            fisher(&models, &[fishers[0].clone().times(-1.0), fishers[1].clone()], FisherNorm::Off).is_err()
        );
    }
}

#[test]
fn spectral_merges_have_the_singular_values_they_promise() {
    for seed in SEEDS {
        let tasks = [random(seed, "a"), random(seed, "b"), random(seed, "c")];
        let total = tasks[0].plus(&tasks[1], 1.0).unwrap().plus(&tasks[2], 1.0).unwrap();
        let spectrum = |t: &TaskVector| svd(&t.sites[&q(0)]).unwrap().sigma;
        let plain = spectrum(&total);
        let even = plain.iter().sum::<f64>() / 6.0;
        assert!(spectrum(&iso_c(&tasks).unwrap()).iter().all(|s| (s - even).abs() < 1e-9));
        assert!(plain[0] - plain[5] > 0.1, "the sum itself is not isotropic");
        let cts = spectrum(&iso_cts(&tasks, 0.4).unwrap());
        assert!(cts[0] - cts[5] < 1e-9 && cts[0] > 0.1);
        assert!(apart(&iso_cts(&tasks, 1.0).unwrap(), &iso_c(&tasks).unwrap()) < 1e-9);
        assert!(apart(&iso_cts(&tasks, 0.4).unwrap(), &iso_c(&tasks).unwrap()) > 1e-3);
        // The factors of TSV are orthonormal, so its singular values are the tasks' own, two of each.
        let mut own: Vec<f64> = tasks.iter().flat_map(|t| spectrum(t)[..2].to_vec()).collect();
        own.sort_by(|a, b| b.total_cmp(a));
        let merged = spectrum(&tsv(&tasks).unwrap());
        assert!(merged.iter().zip(&own).all(|(a, b)| (a - b).abs() < 1e-9));
    }
}

#[test]
fn wudi_lowers_interference() {
    for seed in SEEDS {
        let tasks = [random(seed, "a"), random(seed, "b")];
        let loss = |t: &TaskVector| -> f64 {
            let one = |task: &TaskVector| {
                let (mut gap, tau) = (t.sites[&q(0)].clone(), &task.sites[&q(0)]);
                add(&mut gap, tau, -1.0);
                (norm(&gap.matmul(&tau.transpose()).unwrap()) / norm(tau)).powi(2)
            };
            tasks.iter().map(one).sum()
        };
        let start = loss(&tasks[0].plus(&tasks[1], 1.0).unwrap());
        let end = loss(&wudi(&tasks, 300, 1e-2).unwrap());
        assert!(end < 0.5 * start, "{end} of {start}");
    }
}

#[test]
fn emr_and_lines_by_hand() {
    let one =
        |values: &[f64]| TaskVector { sites: [(q(1), Matrix::new(2, 2, values.to_vec()).unwrap())].into() };
    let merged = emr(&[one(&[1.0, -2.0, 3.0, 0.0]), one(&[-3.0, -1.0, 1.0, 0.0])]).unwrap();
    assert_eq!(merged.unified, one(&[-3.0, -2.0, 3.0, 0.0]));
    // Task 0 agrees in the second and third entry: |tau| sums to 6, the unified vector to 5 there.
    let factor = 6.0 / 5.0;
    assert!(apart(&merged.task(0).unwrap(), &one(&[0.0, -2.0 * factor, 3.0 * factor, 0.0])) < 1e-12);
    assert!(merged.task(2).is_none());
    assert!(apart(&lines(one(&[1.0; 4]), 3, 0.2, 1.0), &one(&[0.6; 4])) < 1e-12);
}
