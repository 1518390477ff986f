//! The command-line contract: fields, exit codes, files.

use crate::{command, family, files, json, run, text};

#[test]
fn eval_generate_inspect() {
    let dir = tempfile::tempdir().unwrap();
    let file = text(dir.path(), "t.txt", "stone", 8);
    let file = file.to_str().unwrap();
    let eval = json(dir.path(), &["eval", "--model", "embedded", "--data", file, "--window", "64"]);
    let nll = eval["mean_nll"].as_f64().unwrap();
    assert!((eval["perplexity"].as_f64().unwrap() - nll.exp()).abs() < 1e-9 * nll.exp());
    assert_eq!(eval["tokens"].as_u64().unwrap() % 63, 0, "windows of 64 predict 63 tokens each");
    assert!(eval["bits_per_byte"].as_f64().unwrap() > 0.0);

    let generate = |extra: &[&str]| {
        let base = ["generate", "--model", "embedded", "--prompt", "In the beginning", "--max-tokens", "8"];
        json(dir.path(), &[&base, extra].concat())
    };
    let greedy = generate(&["--temperature", "0"]);
    assert_eq!(greedy["ids"].as_array().unwrap().len(), 8);
    assert!(greedy["prompt_ids"].as_array().unwrap().len() > 1);
    assert_eq!(greedy, generate(&["--temperature", "0", "--no-cache"]), "the cache changes nothing");
    let sampled = generate(&["--temperature", "1.5", "--seed", "1"]);
    assert_eq!(sampled, generate(&["--temperature", "1.5", "--seed", "1"]));
    assert_ne!(
        sampled["ids"],
        generate(&["--temperature", "1.5", "--seed", "2"])["ids"],
        "control: seeds differ"
    );

    for how in ["off", "exact", "8bit"] {
        let ids = generate(&["--temperature", "0", "--packed", how])["ids"].clone();
        assert!(ids.as_array().is_some_and(|ids| ids.len() == 8));
        assert!(
            how == "8bit" || ids == greedy["ids"],
            "{how}: weights as they are in the file change nothing"
        );
        let ids = generate(&["--temperature", "0", "--packed", how, "--dtype", "bf16"])["ids"].clone();
        // Rounded inputs of the prompt do not change the first token.
        assert!(ids.as_array().is_some_and(|ids| ids.len() == 8) && ids[0] == greedy["ids"][0]);
    }
    let nll_of = |how: &str| {
        let eval = ["eval", "--model", "embedded", "--data", file, "--window", "64", "--packed", how];
        json(dir.path(), &eval)["mean_nll"].as_f64().unwrap()
    };
    assert_eq!(nll_of("off"), nll);
    assert!((nll_of("exact") - nll).abs() < 1e-5 * nll);
    let lost = (nll_of("8bit") - nll).abs();
    assert!(lost > 0.0 && lost < 0.01 * nll, "inputs of 8 bits: {lost}");

    let inspect = json(dir.path(), &["inspect", "embedded"]);
    assert_eq!(inspect["config"]["model_type"], "llama");
    assert!(inspect["parameters"].as_u64().unwrap() > 1_000_000);
}

#[test]
fn convert_keeps_what_the_model_says() {
    let dir = tempfile::tempdir().unwrap();
    let file = text(dir.path(), "t.txt", "river", 8);
    let eval = |model: &str| {
        let args = ["eval", "--model", model, "--data", file.to_str().unwrap(), "--window", "64"];
        json(dir.path(), &args)["mean_nll"].as_f64().unwrap()
    };
    let base = eval("embedded");
    for (out, dtype, tolerance) in
        [("folder", "f32", 1e-6), ("m.gguf", "f16", 2e-3), ("q.gguf", "q4_0", 0.5), ("h", "bf16", 2e-2)]
    {
        json(dir.path(), &["convert", "embedded", out, "--type", dtype]);
        let found = eval(out);
        assert!((found - base).abs() < tolerance, "{out}: {found} against {base}");
        assert!(dtype == "f32" || found != base, "control: {dtype} rounds");
    }
}

#[test]
fn train_prune_quantize_profile() {
    let dir = tempfile::tempdir().unwrap();
    let file = text(dir.path(), "t.txt", "falcon", 24);
    let file = file.to_str().unwrap();
    let common = ["--model", "embedded", "--data", file, "--window", "64"];
    json(dir.path(), &[&["profile"], &common[..], &["--windows", "4", "--out", "profile"]].concat());
    for name in ["profile.json", "bits.toml", "ranks.toml", "report.json", "report.html"] {
        assert!(dir.path().join("profile").join(name).exists(), "{name}");
    }
    let train = |out: &str, extra: &[&str]| {
        let base = ["train", "--steps", "6", "--batch", "2", "--learning-rate", "0.01", "--out", out];
        json(dir.path(), &[&base[..], &common[..], extra].concat())
    };
    let trained = train("adapter", &["--plan", "profile/ranks.toml"]);
    assert!(trained["final_loss"].as_f64().unwrap() < trained["first_loss"].as_f64().unwrap());
    let eval = |extra: &[&str]| {
        json(dir.path(), &[&["eval"], &common[..], extra].concat())["mean_nll"].as_f64().unwrap()
    };
    let base = eval(&[]);
    assert!(eval(&["--adapter", "adapter"]) < base, "the adapter learned its text");
    train("again", &["--plan", "profile/ranks.toml"]);
    let weights =
        |name: &str| std::fs::read(dir.path().join(name).join("adapter_model.safetensors")).unwrap();
    assert_eq!(weights("adapter"), weights("again"), "same seed, same bytes");

    // Text of the kind the model knows: on one that it finds absurd, worse weights may do better.
    let known = firebrick_train::domain("scripture").unwrap().held_out_text();
    std::fs::write(dir.path().join("known.txt"), &known[..16 * 1024]).unwrap();
    let nll = |model: &str| {
        let args = ["eval", "--model", model, "--data", "known.txt", "--window", "64"];
        json(dir.path(), &args)["mean_nll"].as_f64().unwrap()
    };
    let quantize = |out: &str, bits: &str| {
        let args =
            ["quantize", "--model", "embedded", "--data", "known.txt", "--window", "64", "--windows", "4"];
        json(dir.path(), &[&args[..], &["--bits", bits, "--group", "64", "--out", out]].concat());
        nll(out)
    };
    let (base, eight, two) = (nll("embedded"), quantize("q8.gguf", "8"), quantize("q2.gguf", "2"));
    assert!((eight - base).abs() < 0.02, "{eight} against {base}");
    assert!(two > eight, "control: two bits hurt");

    json(
        dir.path(),
        &[&["prune", "--drop", "block", "--count", "2", "--out", "pruned"], &common[..4]].concat(),
    );
    let before = json(dir.path(), &["inspect", "embedded"])["config"]["layers"].as_u64().unwrap();
    let after = json(dir.path(), &["inspect", "pruned"])["config"]["layers"].as_u64().unwrap();
    assert_eq!(after + 2, before);
}

#[test]
fn merge_writes_what_was_asked() {
    let dir = tempfile::tempdir().unwrap();
    json(dir.path(), &["convert", "embedded", "a"]);
    json(dir.path(), &["convert", "embedded", "b", "--type", "bf16"]);
    let yaml = "merge_method: linear\nmodels:\n  - model: a\n    parameters: {weight: 1.0}\n  - model: b\n    parameters: {weight: 0.0}\ndtype: float32\n";
    std::fs::write(dir.path().join("m.yml"), yaml).unwrap();
    let plan = json(dir.path(), &["merge", "m.yml", "out", "--dry-run", "--max-memory", "64MiB"]);
    assert!(plan.is_object() && !dir.path().join("out").exists());
    let analysis = json(dir.path(), &["merge", "m.yml", "out", "--analyze", "--report", "before"]);
    let html = std::fs::read_to_string(dir.path().join("before/report.html")).unwrap();
    assert!(html.contains("Opposite signs") && html.contains("self_attn.q_proj"));
    assert_eq!((&analysis["reference"], &analysis["models"][0]), (&"a".into(), &"b".into()));
    let relative = analysis["whole"]["relative"][0].as_f64().unwrap();
    assert!(relative > 0.0 && relative < 0.01, "rounding to bf16 moves weights by less than 1 %: {relative}");
    assert!(!dir.path().join("out").exists(), "an analysis merges nothing");
    json(dir.path(), &["merge", "m.yml", "out", "--max-memory", "64MiB"]);
    let bytes = |p: &str| std::fs::read(dir.path().join(p).join("model.safetensors")).unwrap();
    assert_eq!(bytes("out"), bytes("a"), "weights (1, 0) are the first model bit for bit");
    std::fs::write(
        dir.path().join("m.yml"),
        yaml.replace("1.0", "0.0").replace("0.0}\ndtype", "1.0}\ndtype"),
    )
    .unwrap();
    json(dir.path(), &["merge", "m.yml", "out2"]);
    assert_ne!(bytes("out2"), bytes("a"), "control");
}

#[test]
fn merges_take_stages_slices_and_gguf_files() {
    let dir = tempfile::tempdir().unwrap();
    json(dir.path(), &["convert", "embedded", "a"]);
    json(dir.path(), &["convert", "embedded", "b.gguf", "--type", "f32"]);
    // The first two layers twice, then the mean of that with itself from another kind of file.
    let stages = "
name: tall
merge_method: passthrough
slices:
- sources: [{model: a, layer_range: [0, 2]}]
- sources: [{model: b.gguf, layer_range: [0, 8]}]
---
merge_method: linear
models: [{model: tall}, {model: tall}]
parameters: {weight: 0.5}
";
    std::fs::write(dir.path().join("m.yml"), stages).unwrap();
    json(dir.path(), &["merge", "m.yml", "out"]);
    let layers = |model: &str| json(dir.path(), &["inspect", model])["config"]["layers"].as_u64().unwrap();
    assert_eq!(layers("out"), 10);
    let left = std::fs::read_dir(dir.path()).unwrap().count();
    assert_eq!(left, 5, "nothing of the stages beside a, b.gguf and its record, m.yml and out");
    let card = std::fs::read_to_string(dir.path().join("out/README.md")).unwrap();
    assert!(card.contains("- \"tall\"") && !card.contains(".stages"), "{card}");
    json(dir.path(), &["generate", "--model", "out", "--prompt", "In the", "--max-tokens", "4"]);
    let of = |model: &str, tensor: &str| {
        firebrick_tensor::checkpoint::Checkpoint::open(dir.path().join(model))
            .unwrap()
            .read_f32(tensor)
            .unwrap()
    };
    for (from, to) in [(0, 0), (1, 1), (0, 2), (7, 9)] {
        let name = |layer: usize| format!("model.layers.{layer}.self_attn.q_proj.weight");
        assert_eq!(of("a", &name(from)), of("out", &name(to)), "layer {to}");
    }
    let refused = run(dir.path(), &["merge", "m.yml", "plan", "--dry-run"]);
    assert_eq!(refused.status.code(), Some(2));
}

#[test]
fn diff_and_inspect_say_what_is_there() {
    let dir = tempfile::tempdir().unwrap();
    json(dir.path(), &["convert", "embedded", "a"]);
    json(dir.path(), &["convert", "embedded", "a.gguf"]);
    json(dir.path(), &["convert", "embedded", "half", "--type", "bf16"]);
    let same = json(dir.path(), &["diff", "a", "a.gguf"]);
    assert_eq!(same["total"]["max_abs"].as_f64(), Some(0.0));
    assert!(same["tensors"].as_array().unwrap().iter().all(|t| t["identical"] == true));
    let half = json(dir.path(), &["diff", "a", "half"]);
    let relative = half["total"]["relative"].as_f64().unwrap();
    assert!(relative > 0.0 && relative < 4e-3, "bf16 has 8 bits of mantissa: {relative}");
    assert_eq!(half["tensors"][0]["b"]["type"], "bf16");
    let layers = json(dir.path(), &["inspect", "a"])["config"]["layers"].as_u64().unwrap() as usize;
    assert_eq!(half["layers"].as_array().unwrap().len(), layers);
    let text = String::from_utf8(run(dir.path(), &["diff", "a", "half"]).stdout).unwrap();
    assert!(text.contains("mlp.down") && text.contains("layers.0") && text.contains("f32"), "{text}");

    // Shards are the model, and what is in none of them is missing.
    json(dir.path(), &["convert", "embedded", "shards", "--shard-size", "3MB"]);
    let count = files(&dir.path().join("shards")).keys().filter(|n| n.ends_with(".safetensors")).count();
    assert!(count > 3, "12 MB in files of 3 MB: {count}");
    assert!(dir.path().join("shards/model.safetensors.index.json").exists());
    assert_eq!(json(dir.path(), &["diff", "a", "shards"])["total"], same["total"]);

    let found = json(dir.path(), &["inspect", "a", "--check"]);
    assert_eq!((found["problems"].as_array().unwrap().len(), &found["checked_values"]), (0, &true.into()));
    assert!(found["parts"]["mlp.down"][1].as_u64().unwrap() > 100_000);
    // A value that is none, in the last tensor of the file.
    let path = dir.path().join("a/model.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    let end = bytes.len() - 4;
    bytes[end..].copy_from_slice(&f32::NAN.to_le_bytes());
    std::fs::write(&path, bytes).unwrap();
    assert!(
        run(dir.path(), &["inspect", "a"]).status.success(),
        "control: values are read with --check only"
    );
    let output = run(dir.path(), &["inspect", "a", "--check", "--json"]);
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(output.status.code(), Some(1));
    assert!(stdout.contains("1 of") && stdout.contains("not finite"), "{stdout}");
    let broken = json(dir.path(), &["diff", "a", "a.gguf"]);
    assert_eq!(broken["total"]["not_finite"].as_u64(), Some(1));

    let config = dir.path().join("a/config.json");
    let text = std::fs::read_to_string(&config).unwrap();
    let more = text.replace(
        &format!("\"num_hidden_layers\": {layers}"),
        &format!("\"num_hidden_layers\": {}", layers + 1),
    );
    assert_ne!(more, text);
    std::fs::write(&config, more).unwrap();
    let output = run(dir.path(), &["inspect", "a"]);
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    let listed = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(stderr.contains("9 problems"), "{stderr}");
    assert_eq!(
        listed.lines().filter(|l| l.contains("problem:") && l.contains("missing")).count(),
        9,
        "{listed}"
    );

    // What is no model is shown and compared by name.
    let tensors = json(dir.path(), &["inspect", "half/model.safetensors"]);
    assert!(tensors["not_a_model"].is_string() && tensors["parameters"].as_u64().unwrap() > 1_000_000);
    let by_name = json(dir.path(), &["diff", "half/model.safetensors", "half/model.safetensors"]);
    assert_eq!(by_name["total"]["max_abs"].as_f64(), Some(0.0));
}

#[test]
fn importance_matrices_are_measured_and_used() {
    let dir = tempfile::tempdir().unwrap();
    let file = text(dir.path(), "t.txt", "copper", 24);
    let file = file.to_str().unwrap();
    let measure = ["imatrix", "--model", "embedded", "--data", file, "--window", "64", "--windows", "8"];
    let done = json(dir.path(), &[&measure[..], &["--out", "i.gguf"]].concat());
    assert_eq!(done["tokens"].as_u64(), Some(512));
    let again = run(dir.path(), &[&measure[..], &["--out", "i.gguf"]].concat());
    assert_eq!(again.status.code(), Some(2), "what is there is kept");
    let eval = |model: &str| {
        let args = ["eval", "--model", model, "--data", file, "--window", "64"];
        json(dir.path(), &args)["mean_nll"].as_f64().unwrap()
    };
    json(dir.path(), &["convert", "embedded", "plain.gguf", "--type", "iq4_nl"]);
    json(dir.path(), &["convert", "embedded", "weighted.gguf", "--type", "iq4_nl", "--imatrix", "i.gguf"]);
    let (base, plain, weighted) = (eval("embedded"), eval("plain.gguf"), eval("weighted.gguf"));
    println!("embedded {base}, iq4_nl {plain}, with importance {weighted}");
    assert!(weighted != plain && (weighted - base).abs() < 0.1, "{base}, {plain}, {weighted}");

    // Rows of 192 and 384 hold no super-block: what stands in is said.
    let output = run(dir.path(), &["convert", "embedded", "k.gguf", "--type", "q4_k"]);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && stderr.contains("become q5_0"), "{stderr}");
    let inspect = json(dir.path(), &["inspect", "k.gguf"]);
    assert!(inspect["types"]["q5_0"].is_array() && inspect["types"]["q4_k"].is_null(), "{inspect}");
}

#[test]
fn wrong_calls_say_what_to_do_and_leave_nothing() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("short.txt"), "too short").unwrap();
    text(dir.path(), "known.txt", "stone", 4);
    std::fs::write(dir.path().join("binary"), [0xff, 0xfe, 0x00]).unwrap();
    std::fs::write(dir.path().join("broken.gguf"), b"GGUF\x03\0\0\0\xff\xff\xff\xff\xff\xff\xff\xff")
        .unwrap();
    std::fs::write(dir.path().join("m.yml"), "merge_method: linear\nmodles: []\n").unwrap();
    let cases: &[(&[&str], i32, &str)] = &[
        (&["eval", "--model", "nowhere", "--data", "short.txt"], 2, "nowhere"),
        (&["eval", "--model", "embedded"], 2, "--data"),
        (&["eval", "--model", "embedded", "--data", "short.txt"], 1, "window"),
        (&["eval", "--model", "embedded", "--data", "missing.txt"], 1, "missing.txt"),
        (&["eval", "--model", "embedded", "--data", "binary"], 1, "byte 0"),
        (&["inspect", "broken.gguf"], 1, "broken.gguf"),
        (&["merge", "m.yml", "out"], 1, "modles"),
        (&["convert", "embedded", "out", "--type", "q3_9"], 2, "q8_0"),
        (&["convert", "embedded", "out", "--type", "q4_0"], 2, ".gguf"),
        (&["convert", "embedded", "out", "--imatrix", "known.txt"], 2, "no blocks to weigh"),
        (&["convert", "embedded", "x.gguf", "--type", "q4_0", "--imatrix", "known.txt"], 1, "known.txt"),
        (&["diff", "embedded", "nowhere"], 2, "nowhere"),
        (&["diff", "embedded", "broken.gguf"], 1, "broken.gguf"),
        (
            &["quantize", "--model", "embedded", "--data", "known.txt", "--k-quants", "--out", "out"],
            2,
            "--k-quants",
        ),
        (&["convert", "embedded", "m.yml"], 2, "--overwrite"),
        (&["merge", "m.yml", "binary"], 2, "--overwrite"),
        (&["inspect", "embedded", "--device", "tpu"], 2, "tpu"),
        (&["train", "--model", "embedded", "--data", "short.txt", "--out", "out"], 1, "window"),
        (
            &["quantize", "--model", "embedded", "--data", "short.txt", "--bits", "5", "--out", "out"],
            2,
            "2, 3, 4 or 8",
        ),
        (
            &["quantize", "--model", "embedded", "--data", "short.txt", "--windows", "0", "--out", "out"],
            2,
            "--windows",
        ),
        (
            &[
                "quantize",
                "--model",
                "embedded",
                "--data",
                "short.txt",
                "--method",
                "rtn",
                "--act-order",
                "--out",
                "out",
            ],
            2,
            "--act-order",
        ),
        (
            &[
                "prune",
                "--model",
                "embedded",
                "--data",
                "known.txt",
                "--drop",
                "attn",
                "--count",
                "99",
                "--out",
                "out",
            ],
            2,
            "99",
        ),
        (&["specialize", "--data", "../up=short.txt"], 2, "name"),
        (&["specialize", "--steps", "0", "--bits", "1.5"], 2, "--steps must be at least 1; --bits 1.5"),
        (&["specialize", "--data", "law=short.txt"], 1, "`law` (short.txt) is too short for --window"),
    ];
    for (arguments, code, part) in cases {
        let output = run(dir.path(), arguments);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(*code), "{arguments:?}: {stderr}");
        assert!(stderr.contains(part), "{arguments:?} should say `{part}`: {stderr}");
        assert!(!stderr.contains("panicked"), "{arguments:?}: {stderr}");
        assert!(output.stdout.is_empty(), "{arguments:?} printed to stdout");
    }
    let mut left: Vec<String> = std::fs::read_dir(dir.path())
        .unwrap()
        .map(|e| e.unwrap().file_name().to_string_lossy().into_owned())
        .collect();
    left.sort();
    assert_eq!(left, ["binary", "broken.gguf", "known.txt", "m.yml", "short.txt"]);
}

#[test]
fn completions_and_manual_pages_name_every_verb() {
    let dir = tempfile::tempdir().unwrap();
    let help = String::from_utf8(run(dir.path(), &["--help"]).stdout).unwrap();
    let verbs: Vec<&str> = help
        .lines()
        .skip_while(|line| !line.starts_with("Commands:"))
        .skip(1)
        .take_while(|line| !line.is_empty())
        .filter_map(|line| line.strip_prefix("  ")?.split(' ').next().filter(|verb| !verb.is_empty()))
        .filter(|verb| *verb != "help")
        .collect();
    assert!(verbs.len() > 10 && verbs.contains(&"specialize"), "{verbs:?}");
    for shell in ["bash", "zsh", "fish", "powershell", "elvish"] {
        let output = run(dir.path(), &["completions", shell]);
        let script = String::from_utf8(output.stdout).unwrap();
        let missing: Vec<_> = verbs.iter().filter(|verb| !script.contains(**verb)).collect();
        assert!(output.status.success() && missing.is_empty(), "{shell}: {missing:?}");
    }
    let written = json(dir.path(), &["man", "man1"]);
    assert_eq!(written["pages"].as_u64().unwrap() as usize, verbs.len() + 1);
    for verb in &verbs {
        let page = std::fs::read_to_string(dir.path().join(format!("man1/firebrick-{verb}.1"))).unwrap();
        assert!(page.contains(".TH") && page.contains("\\-\\-device"), "{verb}: {page}");
    }
    assert_eq!(
        run(dir.path(), &["man", "man1"]).status.code(),
        Some(2),
        "control: nothing is replaced unasked"
    );
}

#[test]
fn models_of_the_hugging_face_hub_are_found_in_its_cache() {
    let dir = tempfile::tempdir().unwrap();
    let repo = dir.path().join("home/hub/models--org--tiny");
    let snapshot = repo.join("snapshots/0123abc");
    std::fs::create_dir_all(repo.join("refs")).unwrap();
    std::fs::write(repo.join("refs/main"), "0123abc").unwrap();
    family(&repo.join("snapshots"), "llama", |_| {});
    std::fs::rename(repo.join("snapshots/llama"), &snapshot).unwrap();
    let hub = |arguments: &[&str]| {
        command(dir.path(), arguments).env("HF_HOME", "home").env_remove("HF_HUB_CACHE").output().unwrap()
    };
    let found = hub(&["fetch", "org/tiny", "--offline", "--json"]);
    let path: serde_json::Value = serde_json::from_slice(&found.stdout).unwrap();
    assert!(dir.path().join(path["path"].as_str().unwrap()).join("config.json").exists());
    let inspected = hub(&["inspect", "org/tiny@0123abc", "--json"]);
    assert!(inspected.status.success(), "{}", String::from_utf8_lossy(&inspected.stderr));
    for missing in [&["inspect", "org/other"][..], &["fetch", "org/other", "--offline"]] {
        let output = hub(missing);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.code() == Some(2) && stderr.contains("org/other"), "{missing:?}: {stderr}");
    }
}
