use std::path::PathBuf;

use firebrick_tensor::checkpoint::gguf::{Array, Gguf, Value};
use indexmap::IndexMap;
use proptest::prelude::*;
use serde_json::json;

use super::*;

/// One config of every family, as far as it can be from the plainest one.
fn families() -> Vec<DecoderConfig> {
    let tiny = DecoderConfig::tiny(40);
    let llama3 = RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_tokens: 64,
    };
    let all = Biases { qkv: true, o: true, mlp: true };
    let gemma = DecoderConfig {
        norm_placement: NormPlacement::Peri,
        norm_plus_one: true,
        scaled_embedding: true,
        activation: Activation::GeluTanh,
        query_scale: Some(168.0),
        final_softcap: Some(30.0),
        window: Some(7),
        windowed: vec![true, false],
        ..tiny.clone()
    };
    let named = |name: &str, config: DecoderConfig| DecoderConfig { model_type: name.into(), ..config };
    vec![
        named("llama", DecoderConfig { biases: all, rope_scaling: llama3, ..tiny.clone() }),
        named("mistral", DecoderConfig { window: Some(5), ..tiny.clone() }),
        named(
            "qwen2",
            DecoderConfig {
                biases: Biases { qkv: true, ..Biases::default() },
                window: Some(3),
                windowed: vec![false, true],
                ..tiny.clone()
            },
        ),
        named(
            "qwen3",
            DecoderConfig {
                biases: Biases { mlp: false, ..all },
                qk_norm: true,
                rope_scaling: RopeScaling::Linear { factor: 2.0 },
                ..tiny.clone()
            },
        ),
        named("gemma2", DecoderConfig { attn_softcap: Some(50.0), ..gemma.clone() }),
        named(
            "gemma3_text",
            DecoderConfig {
                layers: 3,
                qk_norm: true,
                local_theta: Some(100.0),
                rope_scaling: RopeScaling::Linear { factor: 8.0 },
                windowed: vec![true, true, true],
                ..gemma
            },
        ),
    ]
}

fn hf(change: impl FnOnce(&mut serde_json::Value)) -> Result<DecoderConfig, String> {
    let mut value = DecoderConfig::tiny(40).to_hf("float32");
    change(&mut value);
    DecoderConfig::from_hf(&value).map_err(|problems| problems.join("\n"))
}

fn gguf(
    config: &DecoderConfig,
    change: impl FnOnce(&mut IndexMap<String, Value>),
) -> Result<DecoderConfig, String> {
    let mut metadata = config.to_gguf("test");
    change(&mut metadata);
    let path = PathBuf::from("test.gguf");
    let file = Gguf { path: path.clone(), version: 3, alignment: 32, metadata };
    let family = config.family();
    let sites = family.site_table(config);
    let weighs = sites.entries().iter().filter(|e| e.tensor.is_some());
    let names: Vec<String> = weighs.filter_map(|e| family.gguf_name(e.site)).collect();
    let has = |name: &str| names.iter().any(|n| n == name);
    let tensors = GgufTensors { vocab: config.vocab, has: &has, rope_divisors: config.rope_divisors() };
    DecoderConfig::from_gguf(&file, &tensors, &path).map_err(|e| e.to_string())
}

#[test]
fn both_formats_give_the_config_back() {
    let mut extra = Map::new();
    extra.insert("initializer_range".into(), json!(0.02));
    for norm_placement in [NormPlacement::Pre, NormPlacement::Peri] {
        let config = DecoderConfig {
            tied_head: false,
            norm_placement,
            rope_theta: 500_000.0,
            norm_eps: 0.25,
            extra: extra.clone(),
            ..DecoderConfig::tiny(40)
        };
        assert_eq!(DecoderConfig::from_hf(&config.to_hf("bfloat16")).unwrap(), config);
        let plain = DecoderConfig { extra: Map::new(), ..config.clone() };
        assert_eq!(gguf(&config, |_| ()).unwrap(), plain, "GGUF has no place for what is not understood");
        assert_ne!(plain, config, "control");
        let changed = DecoderConfig { d_ff: 33, ..config.clone() };
        assert_ne!(DecoderConfig::from_hf(&changed.to_hf("bfloat16")).unwrap(), config, "control");
    }
}

#[test]
fn every_family_goes_through_both_formats() {
    let families = families();
    assert_eq!(families.len(), Family::all().len());
    for config in families {
        assert_eq!(config.problems(), Vec::<String>::new());
        let written = config.to_hf("bfloat16");
        assert_eq!(DecoderConfig::from_hf(&written).unwrap(), config);
        assert_eq!(gguf(&config, |_| ()).unwrap(), config);
        let name = config.family().gguf;
        let kept = written.as_object().unwrap().len();
        for key in ["sliding_window", "final_logit_softcapping", "layer_types", "query_pre_attn_scalar"] {
            let Some(value) = written.get(key).filter(|v| !v.is_null()) else { continue };
            if key == "layer_types" && config.window.is_none() {
                continue;
            }
            let mut changed = written.clone();
            changed[key] = match value {
                serde_json::Value::Array(list) => list.iter().map(|_| json!("full_attention")).collect(),
                _ => json!(9),
            };
            assert_ne!(
                DecoderConfig::from_hf(&changed).unwrap(),
                config,
                "control: {name}, {key} of {kept} keys"
            );
        }
        let less = gguf(&config, |m| {
            m.retain(|key, _| !key.contains("sliding") && !key.contains("scal") && !key.contains("softcap"));
        });
        assert!(less.as_ref() != Ok(&config), "control: {name} needs its keys");
    }
}

#[test]
fn files_of_transformers_4_are_read() {
    let base = families().remove(0).to_hf("float32");
    let without = |change: &dyn Fn(&mut serde_json::Value)| {
        let mut value = base.clone();
        for key in ["rope_parameters", "rope_scaling", "rope_theta"] {
            value.as_object_mut().unwrap().remove(key);
        }
        change(&mut value);
        DecoderConfig::from_hf(&value).unwrap()
    };
    let llama = without(&|v| {
        v["rope_theta"] = 10_000.0.into();
        v["rope_scaling"] = json!({"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
            "original_max_position_embeddings": 64, "rope_type": "llama3"});
    });
    assert_eq!(llama, families()[0]);
    // The 1B and 4B models as they are published; text only.
    let published = |layers: usize, scaling: serde_json::Value| {
        DecoderConfig::from_hf(&json!({
            "architectures": ["Gemma3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
            "attn_logit_softcapping": null, "cache_implementation": "hybrid", "final_logit_softcapping": null,
            "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152, "initializer_range": 0.02,
            "intermediate_size": 6912, "max_position_embeddings": 32768, "model_type": "gemma3_text",
            "num_attention_heads": 4, "num_hidden_layers": layers, "num_key_value_heads": 1,
            "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-6, "rope_local_base_freq": 10000,
            "rope_scaling": scaling, "rope_theta": 1000000, "sliding_window": 512, "sliding_window_pattern": 6,
            "use_cache": true, "vocab_size": 262144
        }))
        .unwrap()
    };
    let one = published(26, json!(null));
    assert!(one.tied_head && one.local_theta == Some(10_000.0) && one.rope_scaling.is_none());
    assert_eq!((one.window, one.query_scale, one.attention_scale()), (Some(512), None, 1.0 / 16.0));
    let full: Vec<usize> = (0..26).filter(|l| !one.is_windowed(*l)).collect();
    assert_eq!(full, [5, 11, 17, 23]);
    let four = published(34, json!({"factor": 8.0, "rope_type": "linear"}));
    assert_eq!(four.rope_scaling, RopeScaling::Linear { factor: 8.0 });
    // llama.cpp's file of the first says less.
    let silent = gguf(&one, |m| {
        m.shift_remove("gemma3.attention.sliding_window_pattern");
        m.shift_remove("gemma3.rope.freq_base_swa");
    });
    assert_eq!(DecoderConfig { extra: one.extra.clone(), ..silent.unwrap() }, one);
}

#[test]
fn layers_take_their_windows_along() {
    let config = DecoderConfig { layers: 3, windowed: vec![true, true, false], ..families().remove(5) };
    assert_eq!(config.window_period(), Some(3));
    let cut = config.with_layers(&[2, 0]);
    assert_eq!((cut.layers, &cut.windowed[..]), (2, &[false, true][..]));
    assert!(cut.problems().is_empty() && cut.window_period().is_none());
    assert_eq!(gguf(&cut, |_| ()).unwrap(), cut, "a list where there is no period");
    let numbers = gguf(&cut, |m| {
        let list = Value::Array(Array::I32(vec![0, 1]));
        m.insert("gemma3.attention.sliding_window_pattern".into(), list);
    });
    assert_eq!(numbers.unwrap(), cut);
}

#[test]
fn a_config_that_no_file_can_hold_is_a_problem() {
    let [llama, mistral, qwen2, qwen3, gemma2, gemma3] = families().try_into().unwrap();
    let bad = [
        (DecoderConfig { qk_norm: true, ..llama.clone() }, "norms on heads"),
        (DecoderConfig { window: Some(3), ..llama.clone() }, "no windows"),
        (DecoderConfig { attn_softcap: Some(3.0), ..llama.clone() }, "attn_logit_softcapping"),
        (DecoderConfig { biases: Biases { o: false, ..llama.biases }, ..llama.clone() }, "either all"),
        (DecoderConfig { norm_placement: NormPlacement::Peri, ..mistral.clone() }, "placed"),
        (DecoderConfig { windowed: vec![true, false], ..mistral }, "all layers or in none"),
        (DecoderConfig { biases: Biases::default(), ..qwen2.clone() }, "does not go without"),
        (DecoderConfig { windowed: vec![true], ..qwen2 }, "1 layers are said"),
        (DecoderConfig { norm_plus_one: true, ..qwen3 }, "1 + weight"),
        (DecoderConfig { activation: Activation::Silu, ..gemma2 }, "silu"),
        (DecoderConfig { window: None, windowed: Vec::new(), ..gemma3.clone() }, "without a window"),
        (DecoderConfig { window: Some(0), ..gemma3.clone() }, "`sliding_window` is 0"),
        (DecoderConfig { query_scale: Some(-1.0), ..gemma3 }, "query_pre_attn_scalar"),
    ];
    for (config, what) in bad {
        let problems = config.problems().join("; ");
        assert!(problems.contains(what), "{what} in: {problems}");
    }
    assert!(llama.gguf_problems().is_empty());
    let other = RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 0.05,
        high_freq_factor: 4.0,
        original_max_tokens: 64,
    };
    let other = DecoderConfig { rope_scaling: other, head_dim: 8, ..llama };
    assert!(other.problems().is_empty() && !other.gguf_problems().is_empty());
}

#[test]
fn everything_unsupported_is_listed() {
    let mut value = families().remove(5).to_hf("float32");
    value["use_bidirectional_attention"] = true.into();
    value["hidden_activation"] = "relu".into();
    value["attn_logit_softcapping"] = 50.0.into();
    value["layer_types"] = json!(["full_attention", "chunked_attention", "full_attention"]);
    value["mlp_bias"] = true.into();
    value["rope_scaling"] = json!({"rope_type": "yarn", "factor": 4.0, "partial_rotary_factor": 0.5});
    value["rope_parameters"] = json!({"sliding_attention": {"rope_type": "linear", "factor": 2.0}});
    let problems = DecoderConfig::from_hf(&value).unwrap_err();
    for what in [
        "use_bidirectional",
        "relu",
        "attn_logit_softcapping",
        "layer_types",
        "mlp_bias",
        "yarn",
        "partial_rotary_factor",
        "layers with windows",
    ] {
        assert!(problems.iter().any(|p| p.contains(what)), "{what} in {problems:?}");
    }
    assert_eq!(problems.len(), 8, "{problems:?}");
    let llama = hf(|v| v["rope_scaling"] = json!({"rope_type": "llama3", "factor": "x"})).unwrap_err();
    for what in
        ["`factor` should be a number", "low_freq_factor", "high_freq_factor", "original_max_position"]
    {
        assert!(llama.contains(what), "{what} in {llama}");
    }
}

#[test]
fn what_describes_other_weights_is_not_kept() {
    let config = hf(|v| {
        v["torch_dtype"] = "float16".into();
        v["quantization_config"] = json!({"bits": 4});
        v["bos_token_id"] = 1.into();
    });
    let written = config.unwrap().to_hf("float32");
    assert_eq!((written.get("torch_dtype"), written.get("quantization_config")), (None, None));
    assert_eq!((&written["dtype"], &written["bos_token_id"]), (&json!("float32"), &json!(1)));
}

#[test]
fn null_is_absent() {
    let theta = |change: fn(&mut serde_json::Value)| hf(change).unwrap().rope_theta;
    assert_eq!(
        theta(|v| {
            v["rope_theta"] = serde_json::Value::Null;
            v["rope_parameters"]["rope_theta"] = 7.0.into();
        }),
        7.0
    );
    assert_eq!(
        theta(|v| {
            v["rope_theta"] = serde_json::Value::Null;
            v["rope_parameters"] = serde_json::Value::Null;
        }),
        10_000.0
    );
    for hidden in ["rope_parameters", "rope_scaling"] {
        let error = hf(|v| {
            v["rope_parameters"] = serde_json::Value::Null;
            v[hidden] = json!({"rope_type": null, "type": "yarn"});
        });
        assert!(error.unwrap_err().contains("yarn"), "{hidden}");
    }
    assert_eq!(hf(|v| v["rms_norm_eps"] = serde_json::Value::Null).unwrap().norm_eps, 1e-6);
    assert_eq!(hf(|v| v["num_key_value_heads"] = serde_json::Value::Null).unwrap().kv_heads, 4);
}

#[test]
fn values_of_another_kind_are_listed() {
    let error = hf(|v| {
        v["rope_theta"] = "10000".into();
        v["rms_norm_eps"] = json!([1e-5]);
        v["tie_word_embeddings"] = "true".into();
        v["norm_placement"] = "post".into();
        v["hidden_size"] = (-1).into();
    })
    .unwrap_err();
    for key in ["rope_theta", "rms_norm_eps", "tie_word_embeddings", "norm_placement", "hidden_size"] {
        assert!(error.contains(key), "{key} in {error}");
    }
}

#[test]
fn numbers_that_can_not_be_meant_are_problems() {
    assert!(DecoderConfig::tiny(40).problems().is_empty());
    let bad = [
        DecoderConfig { rope_theta: 0.0, ..DecoderConfig::tiny(40) },
        DecoderConfig { rope_theta: f64::NAN, ..DecoderConfig::tiny(40) },
        DecoderConfig { rope_theta: 1e300, ..DecoderConfig::tiny(40) },
        DecoderConfig { norm_eps: -1e-5, ..DecoderConfig::tiny(40) },
        DecoderConfig { norm_eps: f64::INFINITY, ..DecoderConfig::tiny(40) },
        DecoderConfig { max_tokens: 0, ..DecoderConfig::tiny(40) },
        DecoderConfig { max_tokens: 1 << 32, ..DecoderConfig::tiny(40) },
    ];
    for config in bad {
        assert_eq!(config.problems().len(), 1, "{config:?}");
    }
    assert!(DecoderConfig { norm_eps: 0.0, ..DecoderConfig::tiny(40) }.problems().is_empty());
}

#[test]
fn gguf_keys_that_are_not_understood_are_refused() {
    let config = DecoderConfig::tiny(40);
    let broken = |key: &str, value: Value| {
        gguf(&config, |m| drop(m.insert(format!("llama.{key}"), value))).unwrap_err()
    };
    assert!(broken("firebrick.norm_placement", "post".into()).contains("post"));
    assert!(broken("rope.dimension_count", Value::U32(2)).contains("2 of 4 rotary dimensions"));
    assert!(broken("rope.scaling.type", "yarn".into()).contains("yarn"));
    let pre = gguf(&config, |m| drop(m.insert("llama.firebrick.norm_placement".into(), "pre".into())));
    assert_eq!(pre.unwrap().norm_placement, NormPlacement::Pre);
}

proptest! {
    #[test]
    fn no_change_of_a_config_panics(
        family in any::<prop::sample::Index>(),
        at in any::<prop::sample::Index>(),
        kind in 0usize..8,
        number: f64,
        text: String,
    ) {
        let mut value = family.get(&families()).to_hf("float32");
        let map = value.as_object_mut().unwrap();
        let key = map.keys().nth(at.index(map.len())).unwrap().clone();
        let new = [
            json!(null), json!(number), json!(text), json!([]), json!({"rope_theta": text}), json!(u64::MAX), json!(-1),
            json!(0),
        ];
        map.insert(key, new[kind].clone());
        if let Ok(config) = DecoderConfig::from_hf(&value) {
            prop_assert!(config.problems().is_empty());
            prop_assert_eq!(DecoderConfig::from_hf(&config.to_hf("float32")).unwrap(), config);
        }
    }
}
