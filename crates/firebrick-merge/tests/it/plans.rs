//! What a configuration means, tensor by tensor: plans written out by hand.

use std::path::Path;

use firebrick_merge::{Merge, MergeConfig};

use crate::merges::{Entry, model};

/// Embedding, two tensors in each of `layers` layers, norm and, unless it is tied, a head.
fn small(root: &Path, name: &str, layers: usize, vocab: usize, tied: bool) {
    let layer = |i: usize| [format!("model.layers.{i}.attn.weight"), format!("model.layers.{i}.mlp.weight")];
    let names: Vec<String> = (0..layers).flat_map(layer).collect();
    let embedding = [vocab, 2];
    let mut tensors: Vec<Entry<'_>> = vec![("model.embed_tokens.weight", &embedding, 1.0)];
    tensors.extend(names.iter().map(|n| (n.as_str(), &[2usize, 2][..], 1.0)));
    tensors.push(("model.norm.weight", &[2], 1.0));
    if !tied {
        tensors.push(("lm_head.weight", &embedding, 1.0));
    }
    model(root, name, &tensors);
}

/// A tokenizer of these words.
fn words(root: &Path, name: &str, words: &str) {
    let vocab: serde_json::Map<String, serde_json::Value> =
        words.split(' ').enumerate().map(|(i, word)| (word.to_owned(), i.into())).collect();
    let json = serde_json::json!({
        "version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "Whitespace"},
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "a"},
    });
    std::fs::write(root.join(name).join("tokenizer.json"), json.to_string()).unwrap();
}

/// The plan of `text`, with the folder of the models as `@` and without what is in all lines alike.
fn plan(root: &Path, text: &str) -> String {
    let at = format!("{}/", root.display());
    let config = MergeConfig::parse(&text.replace('@', &at)).unwrap_or_else(|e| panic!("{}", e.join("\n")));
    let merge = Merge::new(config, String::new(), Path::new("merge.yml")).unwrap_or_else(|e| panic!("{e}"));
    let plan = merge.plan().to_string();
    plan.replace(&at, "@").replace(".weight", "").replace("model.", "").replace(" f32", "")
}

#[track_caller]
fn check(root: &Path, text: &str, expected: &str) {
    let (found, expected) = (plan(root, text), expected.trim_start());
    assert!(found == expected, "found\n{found}\nexpected\n{expected}");
}

fn models() -> tempfile::TempDir {
    let root = tempfile::tempdir().unwrap();
    for name in ["a", "b", "base"] {
        small(root.path(), name, 2, 5, false);
    }
    small(root.path(), "deep", 3, 5, false);
    small(root.path(), "tied", 2, 5, true);
    small(root.path(), "wide", 2, 6, false);
    root
}

#[test]
fn gradients_run_over_the_layers_and_start_outside_of_them() {
    let root = models();
    check(
        root.path(),
        "
merge_method: linear
models:
- {model: '@a', parameters: {weight: [1, 3]}}
- {model: '@b', parameters: {weight: 2}}
",
        "
embed_tokens [5, 2] normalize=1 <- @a/embed_tokens weight=1 + @b/embed_tokens weight=2
layers.0.attn [2, 2] normalize=1 <- @a/layers.0.attn weight=1 + @b/layers.0.attn weight=2
layers.0.mlp [2, 2] normalize=1 <- @a/layers.0.mlp weight=1 + @b/layers.0.mlp weight=2
layers.1.attn [2, 2] normalize=1 <- @a/layers.1.attn weight=3 + @b/layers.1.attn weight=2
layers.1.mlp [2, 2] normalize=1 <- @a/layers.1.mlp weight=3 + @b/layers.1.mlp weight=2
norm [2] normalize=1 <- @a/norm weight=1 + @b/norm weight=2
lm_head [5, 2] normalize=1 <- @a/lm_head weight=1 + @b/lm_head weight=2
",
    );
}

#[test]
fn filters_see_input_names_beside_models_and_output_names_above() {
    let root = models();
    check(
        root.path(),
        "
merge_method: task_arithmetic
base_model: '@base'
slices:
- sources:
  - {model: '@base', layer_range: [0, 1]}
  - model: '@deep'
    layer_range: [2, 3]
    parameters: {weight: [{filter: layers.2.mlp, value: 4}, {filter: norm, value: 5}, {value: 3}]}
- sources:
  - {model: '@base', layer_range: [1, 2]}
  - {model: '@a', layer_range: [0, 1]}
parameters:
  weight: [{filter: layers.0, value: 6}, {filter: lm_head, value: 7}, {filter: norm, value: 8}]
  lambda: [{filter: layers.1, value: 0.5}, {value: 2}]
",
        "
embed_tokens [5, 2] lambda=2 normalize=0 rescale=0 <- @base/embed_tokens density=1 (base) + @deep/embed_tokens density=1 weight=3
layers.0.attn [2, 2] lambda=2 normalize=0 rescale=0 <- @base/layers.0.attn density=1 weight=6 (base) + @deep/layers.2.attn density=1 weight=3
layers.0.mlp [2, 2] lambda=2 normalize=0 rescale=0 <- @base/layers.0.mlp density=1 weight=6 (base) + @deep/layers.2.mlp density=1 weight=4
layers.1.attn [2, 2] lambda=0.5 normalize=0 rescale=0 <- @base/layers.1.attn density=1 (base) + @a/layers.0.attn density=1 weight=6
layers.1.mlp [2, 2] lambda=0.5 normalize=0 rescale=0 <- @base/layers.1.mlp density=1 (base) + @a/layers.0.mlp density=1 weight=6
norm [2] lambda=2 normalize=0 rescale=0 <- @base/norm density=1 weight=8 (base) + @a/norm density=1 weight=8
lm_head [5, 2] lambda=2 normalize=0 rescale=0 <- @base/lm_head density=1 weight=7 (base) + @a/lm_head density=1 weight=7
unused @deep/layers.0.attn
unused @deep/layers.0.mlp
unused @deep/layers.1.attn
unused @deep/layers.1.mlp
unused @deep/norm
unused @deep/lm_head
unused @a/embed_tokens
unused @a/layers.1.attn
unused @a/layers.1.mlp
",
    );
}

#[test]
fn values_nearer_to_the_tensor_win() {
    let root = models();
    check(
        root.path(),
        "
merge_method: linear
modules:
  default:
    slices:
    - sources:
      - {model: '@a', layer_range: [0, 2], parameters: {weight: [{filter: mlp, value: 1}]}}
      - {model: '@b', layer_range: [0, 2]}
      parameters: {weight: [{filter: attn, value: [2, 3]}], normalize: false}
    parameters: {weight: [{filter: norm, value: 4}], normalize: true}
parameters: {weight: 5}
",
        "
embed_tokens [5, 2] normalize=0 <- @a/embed_tokens weight=5 + @b/embed_tokens weight=5
layers.0.attn [2, 2] normalize=0 <- @a/layers.0.attn weight=2 + @b/layers.0.attn weight=2
layers.0.mlp [2, 2] normalize=0 <- @a/layers.0.mlp weight=1 + @b/layers.0.mlp weight=5
layers.1.attn [2, 2] normalize=0 <- @a/layers.1.attn weight=3 + @b/layers.1.attn weight=3
layers.1.mlp [2, 2] normalize=0 <- @a/layers.1.mlp weight=1 + @b/layers.1.mlp weight=5
norm [2] normalize=0 <- @a/norm weight=4 + @b/norm weight=4
lm_head [5, 2] normalize=0 <- @a/lm_head weight=5 + @b/lm_head weight=5
",
    );
}

#[test]
fn stacked_layers_are_numbered_anew() {
    let root = models();
    check(
        root.path(),
        "
merge_method: passthrough
slices:
- sources: [{model: '@a', layer_range: [0, 2]}]
- sources: [{model: '@deep', layer_range: [1, 2], parameters: {scale: 0.5}}]
- sources: [{model: '@b', layer_range: [1, 2]}]
",
        "
embed_tokens [5, 2] <- @a/embed_tokens scale=1
layers.0.attn [2, 2] <- @a/layers.0.attn scale=1
layers.0.mlp [2, 2] <- @a/layers.0.mlp scale=1
layers.1.attn [2, 2] <- @a/layers.1.attn scale=1
layers.1.mlp [2, 2] <- @a/layers.1.mlp scale=1
layers.2.attn [2, 2] <- @deep/layers.1.attn scale=0.5
layers.2.mlp [2, 2] <- @deep/layers.1.mlp scale=0.5
layers.3.attn [2, 2] <- @b/layers.1.attn scale=1
layers.3.mlp [2, 2] <- @b/layers.1.mlp scale=1
norm [2] <- @b/norm scale=1
lm_head [5, 2] <- @b/lm_head scale=1
unused @a/norm
unused @a/lm_head
unused @deep/embed_tokens
unused @deep/layers.0.attn
unused @deep/layers.0.mlp
unused @deep/layers.2.attn
unused @deep/layers.2.mlp
unused @deep/norm
unused @deep/lm_head
unused @b/embed_tokens
unused @b/layers.0.attn
unused @b/layers.0.mlp
",
    );
}

#[test]
fn a_last_slice_without_layers_gives_norm_and_head() {
    let root = models();
    check(
        root.path(),
        "
merge_method: passthrough
slices:
- sources: [{model: '@a', layer_range: [0, 1]}]
- sources: [{model: '@b', layer_range: [0, 0]}]
",
        "
embed_tokens [5, 2] <- @a/embed_tokens scale=1
layers.0.attn [2, 2] <- @a/layers.0.attn scale=1
layers.0.mlp [2, 2] <- @a/layers.0.mlp scale=1
norm [2] <- @b/norm scale=1
lm_head [5, 2] <- @b/lm_head scale=1
unused @a/layers.1.attn
unused @a/layers.1.mlp
unused @a/norm
unused @a/lm_head
unused @b/embed_tokens
unused @b/layers.0.attn
unused @b/layers.0.mlp
unused @b/layers.1.attn
unused @b/layers.1.mlp
",
    );
}

#[test]
fn sources_that_the_first_slice_has_not_count_unless_compat_is_on() {
    let root = models();
    let text = "
merge_method: linear
slices:
- sources: [{model: '@a', layer_range: [0, 1]}]
- sources: [{model: '@a', layer_range: [1, 2]}, {model: '@b', layer_range: [1, 2]}]
parameters: {weight: 1}
";
    let last =
        |text: &str| plan(root.path(), text).lines().find(|l| l.starts_with("norm")).unwrap().to_owned();
    assert_eq!(last(text), "norm [2] normalize=1 <- @a/norm weight=1 + @b/norm weight=1");
    assert_eq!(last(&format!("{text}compat: true\n")), "norm [2] normalize=1 <- @a/norm weight=1");
}

#[test]
fn one_layer_lies_at_the_end_of_a_gradient() {
    let root = models();
    check(
        root.path(),
        "
merge_method: slerp
base_model: '@a'
slices:
- sources: [{model: '@a', layer_range: [1, 2]}, {model: '@b', layer_range: [0, 1]}]
parameters: {t: [0.25, 0.75]}
",
        "
embed_tokens [5, 2] t=0.25 <- @a/embed_tokens (base) + @b/embed_tokens
layers.0.attn [2, 2] t=0.75 <- @a/layers.1.attn (base) + @b/layers.0.attn
layers.0.mlp [2, 2] t=0.75 <- @a/layers.1.mlp (base) + @b/layers.0.mlp
norm [2] t=0.25 <- @a/norm (base) + @b/norm
lm_head [5, 2] t=0.25 <- @a/lm_head (base) + @b/lm_head
unused @a/layers.0.attn
unused @a/layers.0.mlp
unused @b/layers.1.attn
unused @b/layers.1.mlp
",
    );
}

#[test]
fn a_base_that_is_not_listed_is_the_last_source() {
    let root = models();
    check(
        root.path(),
        "
merge_method: ties
base_model: '@base'
models:
- {model: '@a', parameters: {weight: 0.5, density: 0.3}}
parameters: {int8_mask: true, density: 0.6}
dtype: bfloat16
",
        "
embed_tokens bf16 [5, 2] lambda=1 normalize=1 rescale=0 <- @a/embed_tokens density=0.3 weight=0.5 + @base/embed_tokens density=0.6 (base)
layers.0.attn bf16 [2, 2] lambda=1 normalize=1 rescale=0 <- @a/layers.0.attn density=0.3 weight=0.5 + @base/layers.0.attn density=0.6 (base)
layers.0.mlp bf16 [2, 2] lambda=1 normalize=1 rescale=0 <- @a/layers.0.mlp density=0.3 weight=0.5 + @base/layers.0.mlp density=0.6 (base)
layers.1.attn bf16 [2, 2] lambda=1 normalize=1 rescale=0 <- @a/layers.1.attn density=0.3 weight=0.5 + @base/layers.1.attn density=0.6 (base)
layers.1.mlp bf16 [2, 2] lambda=1 normalize=1 rescale=0 <- @a/layers.1.mlp density=0.3 weight=0.5 + @base/layers.1.mlp density=0.6 (base)
norm bf16 [2] lambda=1 normalize=1 rescale=0 <- @a/norm density=0.3 weight=0.5 + @base/norm density=0.6 (base)
lm_head bf16 [5, 2] lambda=1 normalize=1 rescale=0 <- @a/lm_head density=0.3 weight=0.5 + @base/lm_head density=0.6 (base)
",
    );
}

#[test]
fn a_model_that_is_listed_twice_counts_twice() {
    let root = models();
    let text = "
merge_method: linear
models:
- {model: '@a', parameters: {weight: 0.1}}
- {model: '@a', parameters: {weight: 1}}
";
    // mergekit 0.1.5 refuses this, and versions before took one of the two.
    let found = plan(root.path(), text);
    assert!(found.contains("norm [2] normalize=1 <- @a/norm weight=0.1 + @a/norm weight=1\n"), "{found}");
}

#[test]
fn a_tied_head_is_the_embedding_beside_an_untied_one_and_else_nothing() {
    let root = models();
    let text = |a: &str, b: &str| {
        format!(
            "merge_method: linear\nmodels: [{{model: '@{a}'}}, {{model: '@{b}'}}]\nparameters: {{weight: 1}}\n"
        )
    };
    let mixed = plan(root.path(), &text("tied", "a"));
    assert!(
        mixed.ends_with("lm_head [5, 2] normalize=1 <- @tied/embed_tokens weight=1 + @a/lm_head weight=1\n"),
        "{mixed}"
    );
    let tied = plan(root.path(), &text("tied", "tied"));
    assert!(!tied.contains("lm_head") && tied.contains("embed_tokens"), "{tied}");
}

#[test]
fn a_union_of_vocabularies_sets_the_rows() {
    let root = models();
    words(root.path(), "a", "a b c d e");
    words(root.path(), "wide", "a b x y c z");
    let text = "
merge_method: linear
models: [{model: '@a'}, {model: '@wide'}]
parameters: {weight: 1}
tokenizer: {source: union, pad_to_multiple_of: 3}
";
    let found = plan(root.path(), text);
    // a b c d e, then x y z, and one to fill up.
    for name in ["embed_tokens", "lm_head"] {
        let line = format!("{name} [9, 2] normalize=1 <- @a/{name} weight=1 + @wide/{name} weight=1\n");
        assert!(found.contains(&line), "{found}");
    }
    let same = text.replace("@wide", "@b").replace("union, pad_to_multiple_of: 3", "base");
    words(root.path(), "b", "a b c d e");
    assert!(plan(root.path(), &same).contains("embed_tokens [5, 2]"));
}

#[test]
fn slerp_takes_one_model_with_its_base_or_two() {
    let root = models();
    let text = "merge_method: slerp\nbase_model: '@a'\nmodels: [{model: '@b'}]\nparameters: {t: 0.5}\n";
    let found = plan(root.path(), text);
    assert!(found.contains("norm [2] t=0.5 <- @b/norm + @a/norm (base)\n"), "{found}");
}

#[test]
fn parts_of_a_model_have_modules_of_their_own() {
    let root = tempfile::tempdir().unwrap();
    let names = [
        "vision_tower.patch_embed.weight",
        "vision_tower.layers.0.w",
        "vision_tower.layers.1.w",
        "language_model.embed_tokens.weight",
        "language_model.layers.0.w",
        "language_model.norm.weight",
        "lm_head.weight",
    ];
    for name in ["a", "b"] {
        model(root.path(), name, &names.map(|n| (n, &[2, 2][..], 1.0)));
    }
    check(
        root.path(),
        "
merge_method: linear
modules:
  vision_tower: {models: [{model: '@a', parameters: {weight: 1}}]}
  text_decoder:
    slices:
    - sources: [{model: '@a', layer_range: [0, 1]}, {model: '@b', layer_range: [0, 1]}]
    - sources: [{model: '@b', layer_range: [0, 1]}]
    parameters: {weight: 2}
",
        "
vision_tower.patch_embed [2, 2] normalize=1 <- @a/vision_tower.patch_embed weight=1
vision_tower.layers.0.w [2, 2] normalize=1 <- @a/vision_tower.layers.0.w weight=1
vision_tower.layers.1.w [2, 2] normalize=1 <- @a/vision_tower.layers.1.w weight=1
language_embed_tokens [2, 2] normalize=1 <- @a/language_embed_tokens weight=2 + @b/language_embed_tokens weight=2
language_layers.0.w [2, 2] normalize=1 <- @a/language_layers.0.w weight=2 + @b/language_layers.0.w weight=2
language_layers.1.w [2, 2] normalize=1 <- @b/language_layers.0.w weight=2
language_norm [2, 2] normalize=1 <- @b/language_norm weight=2
lm_head [2, 2] normalize=1 <- @b/lm_head weight=2
unused @a/language_norm
unused @a/lm_head
unused @b/vision_tower.patch_embed
unused @b/vision_tower.layers.0.w
unused @b/vision_tower.layers.1.w
",
    );
}

#[test]
fn selectors_take_sites_of_input_and_output() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/config/models");
    let text = "
merge_method: task_arithmetic
base_model: '@base'
slices:
- sources: [{model: '@base', layer_range: [0, 3]}, {model: '@deep', layer_range: [3, 6]}]
- sources: [{model: '@base', layer_range: [1, 3]}, {model: '@deep', layer_range: [0, 2]}]
parameters:
  weight: [{select: 'layers.3-4.mlp.{up,down}, head', value: 0.3}, {select: 're:k_proj', value: 0.7}, {value: 0.1}]
  lambda: [{select: layers.-1.attn, value: 0.5}, {value: 1}]
";
    let text = text.replace('@', &format!("{}/", golden.display()));
    let merge = Merge::new(MergeConfig::parse(&text).unwrap(), text, Path::new("merge.yml")).unwrap();
    let of = |name: &str| merge.plan().tensors.iter().find(|t| t.name == name).unwrap();
    let weight = |name: &str| of(name).sources[1].parameters["weight"];
    // Layers 3 to 5 of `deep` are the first of the output, layers 0 and 1 the last.
    for (name, expected) in [
        ("model.layers.0.mlp.up_proj.weight", 0.3),
        ("model.layers.1.mlp.down_proj.weight", 0.3),
        ("model.layers.1.mlp.gate_proj.weight", 0.1),
        ("model.layers.2.mlp.up_proj.weight", 0.1),
        ("model.layers.4.mlp.up_proj.weight", 0.1),
        ("model.layers.4.self_attn.k_proj.weight", 0.7),
        ("lm_head.weight", 0.3),
        ("model.norm.weight", 0.1),
    ] {
        assert_eq!(weight(name), expected, "{name}");
    }
    let lambda = |name: &str| of(name).global["lambda"];
    assert_eq!(lambda("model.layers.4.self_attn.o_proj.weight"), 0.5, "the last of the output");
    assert_eq!(lambda("model.layers.3.self_attn.o_proj.weight"), 1.0);
    assert_eq!(lambda("model.layers.4.mlp.up_proj.weight"), 1.0);
}
