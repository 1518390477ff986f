use burn::tensor::{DType, Device, Tensor};
use firebrick_tensor::ops::{AttentionOptions, KvCache, attention};

use super::support::{devices, error, flat, host, normal};

fn heads(name: &str, [b, h, t, d]: [usize; 4], device: &Device) -> Tensor<4> {
    flat(&normal(name, b * h * t * d), device, DType::F32).reshape([b, h, t, d])
}

fn values(x: Tensor<4>) -> Vec<f64> {
    let n = x.shape().num_elements();
    host(x.reshape([n]))
}

#[test]
fn returns_everything_appended_in_order() {
    for device in devices() {
        let (k, v) = (heads("k", [2, 3, 7, 4], &device), heads("v", [2, 3, 7, 4], &device));
        let mut cache = KvCache::new(2, 2, 3, 8, 4, &device);
        for (from, to) in [(0, 4), (4, 5), (5, 7)] {
            let (k, v) = (k.clone().narrow(2, from, to - from), v.clone().narrow(2, from, to - from));
            let (keys, all) = cache.append(1, k, v);
            assert_eq!((keys.dims(), all.dims()), ([2, 3, to, 4], [2, 3, to, 4]));
            assert_eq!((cache.len(0), cache.len(1), cache.remaining(1)), (0, to, 8 - to));
        }
        let (last, _) = (k.clone().narrow(2, 0, 1), ());
        let (keys, all) = cache.append(1, last.clone(), last.clone());
        assert_eq!(values(keys.narrow(2, 0, 7)), values(k));
        assert_eq!(values(all.clone().narrow(2, 0, 7)), values(v));
        assert_eq!(values(all.narrow(2, 7, 1)), values(last));
        cache.clear();
        assert_eq!((cache.len(1), cache.is_empty(1), cache.remaining(1)), (0, true, 8));
    }
}

#[test]
fn a_layer_that_is_never_used_costs_nothing() {
    let device = Device::flex();
    let mut cache = KvCache::new(30, 1, 3, 64, 8, &device);
    assert_eq!(cache.bytes(), 0);
    let one = || Tensor::zeros([1, 3, 1, 8], &device);
    cache.append(7, one(), one());
    assert_eq!(cache.bytes(), 2 * 3 * 64 * 8 * 4);
}

#[test]
fn keeps_halves_where_asked() {
    for device in devices() {
        let (k, v) = (heads("k", [1, 3, 5, 4], &device), heads("v", [1, 3, 5, 4], &device));
        let [whole, half] = [false, true].map(|half| {
            let cache = KvCache::new(1, 1, 3, 8, 4, &device);
            let mut cache = if half { cache.in_f16() } else { cache };
            for at in 0..5 {
                cache.append(0, k.clone().narrow(2, at, 1), v.clone().narrow(2, at, 1));
            }
            cache.truncate(4);
            let (keys, all) = cache.append(0, k.clone().narrow(2, 4, 1), v.clone().narrow(2, 4, 1));
            assert_eq!((keys.dtype(), all.dtype()), (DType::F32, DType::F32));
            (cache.bytes(), values(keys), values(all))
        });
        assert_eq!(whole.0, 2 * half.0);
        for (whole, half) in [(whole.1, half.1), (whole.2, half.2)] {
            let e = error(&half, &whole);
            assert!((1e-6..5e-4).contains(&e), "off by {e:e} on {device:?}");
        }
    }
}

#[test]
fn appends_in_place() {
    let device = Device::flex();
    let mut cache = KvCache::new(1, 1, 2, 64, 8, &device);
    let one = || Tensor::ones([1, 2, 1, 8], &device);
    let address = |t: Tensor<4>| {
        t.try_into_primitive::<burn_flex::Flex>().unwrap_or_else(|_| panic!("a CPU tensor")).bytes().as_ptr()
            as usize
    };
    let first = address(cache.append(0, one(), one()).0);
    for _ in 0..3 {
        assert_eq!(address(cache.append(0, one(), one()).0), first);
    }
    // A caller that keeps what it was given forces a copy, and keeps the old values.
    let held = cache.append(0, one(), one()).0;
    assert_ne!(address(cache.append(0, one(), one()).0), first);
    assert_eq!(held.dims(), [1, 2, 5, 8]);
}

#[test]
fn decoding_step_by_step_equals_the_whole() {
    for device in devices() {
        let (q, k, v) = (
            heads("q", [1, 6, 9, 8], &device),
            heads("k", [1, 2, 9, 8], &device),
            heads("v", [1, 2, 9, 8], &device),
        );
        let options = AttentionOptions { scale: 0.35, causal: true, window: Some(5), softcap: None };
        let whole = attention(q.clone(), k.clone(), v.clone(), options.clone());
        let mut cache = KvCache::new(1, 1, 2, 9, 8, &device);
        let mut steps = Vec::new();
        for (from, n) in [(0, 5), (5, 1), (6, 3)] {
            let (keys, all) = cache.append(0, k.clone().narrow(2, from, n), v.clone().narrow(2, from, n));
            steps.push(attention(q.clone().narrow(2, from, n), keys, all, options.clone()));
        }
        let e = error(&values(Tensor::cat(steps, 2)), &values(whole));
        assert!(e < 2e-6, "off by {e:e} on {device:?}");
    }
}

#[test]
fn selected_sequences_go_on_by_themselves() {
    for device in devices() {
        let (k, v) = (heads("k", [2, 3, 5, 4], &device), heads("v", [2, 3, 5, 4], &device));
        let mut cache = KvCache::new(2, 2, 3, 6, 4, &device);
        cache.append(1, k.clone().narrow(2, 0, 4), v.clone().narrow(2, 0, 4));
        let mut chosen = cache.select(&[1, 0, 1], 5);
        assert_eq!((chosen.len(0), chosen.len(1), chosen.remaining(1)), (0, 4, 1));
        let rows = |t: &Tensor<4>| Tensor::cat([1, 0, 1].map(|i| t.clone().narrow(0, i, 1)).to_vec(), 0);
        let last = |t: &Tensor<4>| rows(t).narrow(2, 4, 1);
        let (keys, all) = chosen.append(1, last(&k), last(&v));
        assert_eq!((values(keys), values(all)), (values(rows(&k)), values(rows(&v))));
        // A cut cache goes on from the cut.
        chosen.truncate(2);
        let (keys, _) = chosen.append(1, last(&k), last(&v));
        assert_eq!(values(keys), values(Tensor::cat(vec![rows(&k).narrow(2, 0, 2), last(&k)], 2)));
        // The cache it came from does not notice.
        let (keys, _) = cache.append(1, k.clone().narrow(2, 4, 1), v.clone().narrow(2, 4, 1));
        assert_eq!(values(keys), values(k));
    }
}

#[test]
#[should_panic(expected = "sequences [2] of a batch of 2")]
fn a_sequence_that_is_not_there_is_refused() {
    KvCache::new(1, 2, 1, 4, 2, &Device::flex()).select(&[2], 4);
}

#[test]
#[should_panic(expected = "exceed the capacity of 4")]
fn more_than_the_capacity_is_refused() {
    let device = Device::flex();
    let three = || Tensor::zeros([1, 1, 3, 2], &device);
    let mut cache = KvCache::new(1, 1, 1, 4, 2, &device);
    cache.append(0, three(), three());
    cache.append(0, three(), three());
}
