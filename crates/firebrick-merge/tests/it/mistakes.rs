//! Configurations with mistakes: one message that lists all of them with line and column, and nothing written.

use std::path::Path;

use firebrick_merge::{Merge, MergeError};

use crate::merges::model;

/// Models `a` and `b` of two layers, `deep` of three, `wide` with another vocabulary, `odd` with a tensor of integers.
fn models(root: &Path) {
    let names = |layers: usize| -> Vec<String> {
        let mut names = vec!["model.embed_tokens.weight".to_owned()];
        names.extend((0..layers).map(|i| format!("model.layers.{i}.mlp.weight")));
        names.push("model.norm.weight".to_owned());
        names
    };
    for (name, layers, rows) in [("a", 2, 3), ("b", 2, 3), ("deep", 3, 3), ("wide", 2, 4)] {
        let names = names(layers);
        let shape = |n: &str| if n.contains("embed") { vec![rows, 2] } else { vec![2] };
        let shapes: Vec<Vec<usize>> = names.iter().map(|n| shape(n)).collect();
        let tensors: Vec<_> =
            names.iter().zip(&shapes).map(|(n, s)| (n.as_str(), s.as_slice(), 1.0)).collect();
        model(root, name, &tensors);
    }
    std::fs::write(root.join("damaged.safetensors"), b"not a checkpoint").unwrap();
}

/// Each text with the beginnings of all lines that the message has, in their order. `@` is the folder of the models.
const MISTAKES: &[(&str, &[&str])] = &[
    // What is not YAML, or not a map.
    ("merge_method: [", &["line 1, column"]),
    ("a: 1\na: 2\n", &["line 2, column 1: duplicate"]),
    ("- linear\n", &["line 1, column 1: the configuration should be a map, found a list of 1"]),
    ("", &["the text is empty"]),
    ("linear", &["line 1, column 1: the configuration should be a map, found `linear`"]),
    // Keys.
    (
        "merge_metod: linear\nmodels: [{model: '@a', weight: 1}]\n",
        &[
            "line 1, column 1: `merge_method` is missing",
            "line 1, column 1: unknown key `merge_metod` in the configuration; did you mean `merge_method`?",
            "line 2, column 24: unknown key `weight` in an entry of `models`; known: model, parameters",
        ],
    ),
    (
        "merge_method: linear\nModels: [{model: '@a'}]\nparameters: {weight: 1}\n",
        &[
            "line 1, column 1: one of `models`, `slices` and `modules` is needed, found none of them",
            "line 2, column 1: unknown key `Models` in the configuration; did you mean `models`?",
        ],
    ),
    (
        "merge_method: linear\nmodels: [{model: '@a'}]\nslices: []\nparameters: {weight: 1}\n",
        &["line 1, column 1: one of `models`, `slices` and `modules` is needed, found models and slices"],
    ),
    // Methods.
    (
        "merge_method: lineer\nmodels: [{model: '@a', parameters: {weight: x}}]\n",
        &[
            "line 1, column 15: there is no merge_method `lineer`; did you mean `linear`?",
            "line 2, column 45: `weight` should be a number, a list of numbers, or a list of {filter, value}, found `x`",
        ],
    ),
    (
        "merge_method: 3\nmodels: [{model: '@a'}]\n",
        &["line 1, column 15: `merge_method` should be a name, found 3"],
    ),
    (
        "merge_method: ties\nmodels:\n- {model: '@a', parameters: {weight: 1}}\n- model: '@b'\n",
        &["line 1, column 1: ties needs `base_model`", "line 4, column 3: model `@b` has no `weight`"],
    ),
    (
        "merge_method: slerp\nbase_model: '@a'\nmodels: [{model: '@a'}, {model: '@b'}, {model: '@deep'}]\n",
        &[
            "line 1, column 1: slerp needs the parameter `t`",
            "line 3, column 9: slerp merges 1 to 2 models, there are 3",
        ],
    ),
    (
        "merge_method: passthrough\nmodels: [{model: '@a'}, {model: '@b'}]\n",
        &["line 2, column 9: passthrough merges 1 models, there are 2"],
    ),
    (
        "merge_method: model_stock\nbase_model: '@a'\nmodels: [{model: '@b'}]\n",
        &["line 3, column 9: model_stock merges 3 or more models, there are 2"],
    ),
    (
        "merge_method: linear\nbase_model: '@b'\nmodels: [{model: '@a', parameters: {weight: 1}}]\n",
        &["line 3, column 9: model `@b` has no `weight`"],
    ),
    // Parameters.
    (
        "merge_method: slerp\nbase_model: '@a'\nmodels:\n- {model: '@a'}\n- {model: '@b', parameters: {t: 0.5}}\nparameters: {weight: 1, tt: 2}\n",
        &[
            "line 1, column 1: slerp needs the parameter `t`",
            "line 5, column 30: `t` holds for all models at once",
            "line 6, column 14: slerp has no parameter `weight` (`parameters`); it is one of linear, nuslerp",
            "line 6, column 25: slerp has no parameter `tt` (`parameters`); did you mean `t`?",
        ],
    ),
    (
        "merge_method: ties\nbase_model: '@a'\nmodels:\n- model: '@b'\n  parameters: {density: 1.5, weight: [], gamma: 0.1}\n",
        &[
            "line 4, column 3: model `@b` has no `weight`",
            "line 5, column 25: `density` should lie between 0 and 1",
            "line 5, column 38: `weight` is an empty list",
            "line 5, column 42: ties has no parameter `gamma` (parameters of a model); it is one of breadcrumbs",
        ],
    ),
    (
        "merge_method: linear\nmodels: [{model: '@a'}]\nparameters:\n  weight:\n  - {filter: mlp}\n  - {fliter: attn, value: 1}\n  - {select: 'layers.x', value: 1}\n  - {filter: 3, value: {value: 1}}\n",
        &[
            "line 2, column 10: model `@a` has no `weight`",
            "line 5, column 5: `weight`: `value` is missing beside the filter",
            "line 6, column 6: unknown key `fliter` in `weight`; did you mean `filter`?",
            "line 7, column 14: `weight`: ",
            "line 8, column 14: `weight`: `filter` should be a text, found 3",
            "line 8, column 24: `weight`: `value` should be a number or a list of numbers",
        ],
    ),
    (
        "merge_method: linear\nmodels: [{model: '@a'}]\nparameters: 1\n",
        &[
            "line 2, column 10: model `@a` has no `weight`",
            "line 3, column 13: `parameters` should be a map, found 1",
        ],
    ),
    ("merge_method: linear\nmodels: [{model: '@a'}]\nparameters: {weight: .inf}\n", &["line 3, column 22: "]),
    // Types and switches.
    (
        "merge_method: linear\nmodels: [{model: '@a'}]\nparameters: {weight: 1}\ndtype: int8\nout_dtype: 16\nnumerics: f64\ncompat: 2\nseed: -1\n",
        &[
            "line 4, column 8: `dtype` should be float32, float16 or bfloat16, found `int8`",
            "line 5, column 12: `out_dtype` should be float32, float16 or bfloat16, found 16",
            "line 6, column 11: `numerics` should be f32 or mergekit, found `f64`",
            "line 7, column 9: `compat` should be true or false, found 2",
            "line 8, column 7: `seed` should be a whole number",
        ],
    ),
    // Models.
    (
        "merge_method: linear\nmodels:\n- 'a'\n- {parameters: {weight: 1}}\n- {model: 5}\n- {model: '+b'}\n- {model: {model: {path: '@a', revision: main}, lore: x}}\n",
        &[
            "line 3, column 3: an entry of `models` should be a map, found `a`",
            "line 4, column 3: `model` is missing in an entry of `models`",
            "line 5, column 11: `model` should be a path, found 5",
            "line 6, column 11: `model`: `+b` names no model",
            "line 7, column 42: `revision` is one of the Hub",
            "line 7, column 49: unknown key `lore` in `model`; did you mean `lora`?",
        ],
    ),
    (
        "merge_method: linear\nmodels: {}\n",
        &["line 2, column 9: `models` of the configuration should be a list"],
    ),
    ("merge_method: linear\nmodels: []\n", &["line 2, column 9: `models` of the configuration is empty"]),
    (
        "merge_method: linear\nmodels: [{model: '@missing'}, {model: '@damaged.safetensors'}, {model: '@a'}]\nparameters: {weight: 1}\n",
        &[
            "line 2, column 10: there is no folder or file `@missing`",
            "line 2, column 31: @damaged.safetensors",
        ],
    ),
    // Slices.
    (
        "merge_method: passthrough\nslices:\n- sources: [{model: '@a', layer_range: [1]}]\n- sources: [{model: '@a'}]\n- sources: [{model: '@a', layer_range: [2, 1]}]\n- sources: []\n- source: []\n- 3\n",
        &[
            "line 3, column 40: `layer_range` should be two layer numbers",
            "line 4, column 13: `layer_range` is missing",
            "line 5, column 40: `layer_range` ends at 1, before it starts at 2",
            "line 6, column 12: `sources` of a slice is empty",
            "line 7, column 3: `sources` is missing in a slice",
            "line 7, column 3: unknown key `source` in a slice; did you mean `sources`?",
            "line 8, column 3: a slice should be a map, found 3",
        ],
    ),
    (
        "merge_method: slerp\nbase_model: '@a'\nparameters: {t: 0.5}\nslices:\n- sources:\n  - {model: '@b', layer_range: [0, 2]}\n  - {model: '@deep', layer_range: [0, 3]}\n",
        &[
            "line 5, column 3: the base `@a` is no source of this slice, as slerp needs it",
            "line 7, column 5: `@deep` gives 3 layers to this slice, `@b` gives 2",
        ],
    ),
    (
        "merge_method: passthrough\nslices:\n- sources: [{model: '@a', layer_range: [0, 3]}]\n- sources: [{model: '@b', layer_range: [5, 9]}]\n",
        &[
            "line 3, column 13: `@a` has 2 layers, there are none up to 3 as `layer_range` says",
            "line 4, column 13: `@b` has 2 layers, there are none up to 9",
        ],
    ),
    (
        "merge_method: passthrough\nslices:\n- sources: [{model: '@a', layer_range: [0, 0]}]\n",
        &["line 1, column 1: the slices of the configuration have no layers"],
    ),
    // What the models have.
    (
        "merge_method: linear\nmodels: [{model: '@a'}, {model: '@deep'}, {model: '@wide'}]\nparameters: {weight: 1}\n",
        &[
            "line 2, column 9: `model.embed_tokens.weight` has shape [4, 2] in `@wide` and [3, 2] in `@a`; with a `tokenizer`",
            "line 2, column 25: `@deep` has 3 layers, `@a` has 2",
        ],
    ),
    (
        "merge_method: linear\nmodels: [{model: '@a', parameters: {weight: 1}}, {model: '@b', parameters: {weight: -1}}]\n",
        &[
            "line 2, column 9: weights add up to 0 at `model.embed_tokens.weight`, `model.layers.0.mlp.weight`, `model.layers.1.mlp.weight`, `model.norm.weight`",
        ],
    ),
    (
        "merge_method: linear\nmodels:\n- model: '@a'\n  parameters: {weight: [{filter: mlp, value: 1}]}\n",
        &[
            "line 3, column 3: `weight` of model `@a`: no filter takes `model.embed_tokens.weight`, `model.norm.weight`",
        ],
    ),
    (
        "merge_method: slerp\nbase_model: '@a'\nmodels: [{model: '@b'}]\nparameters: {t: [{filter: nothing, value: 1}]}\n",
        &["line 3, column 9: `t`: no filter takes `model.embed_tokens.weight`, "],
    ),
    (
        "merge_method: linear\nmodels: [{model: '@a'}]\nparameters: {weight: [{select: mlp, value: 1}, {value: 2}]}\n",
        &[
            "line 3, column 14: `weight`: the selector `mlp` takes nothing: the sites of these models are not known",
        ],
    ),
    // Modules.
    (
        "merge_method: linear\nparameters: {weight: 1}\nmodules:\n  vision_tower: {models: [{model: '@a'}]}\n",
        &[
            "line 1, column 1: the layers of no module are those behind `model.layers`",
            "line 4, column 3: there is no module `vision_tower`; there are layers behind `model.layers`",
        ],
    ),
    (
        "merge_method: linear\nparameters: {weight: 1}\nmodules:\n  default: {models: [{model: '@a'}], slices: [], weight: 1}\n  other: {}\n",
        &[
            "line 4, column 46: module `default` has both `models` and `slices`",
            "line 4, column 50: unknown key `weight` in module `default`",
            "line 5, column 10: module `other` needs `models` or `slices`",
        ],
    ),
    // Tokenizers.
    (
        "merge_method: linear\nmodels: [{model: '@a'}]\nparameters: {weight: 1}\ntokenizer_source: union\ntokenizer: {source: base}\nchat_template: 3\n",
        &[
            "line 5, column 12: both `tokenizer_source` and `tokenizer` are given",
            "line 6, column 16: `chat_template` should be a text, found 3",
        ],
    ),
    (
        "merge_method: linear\nmodels: [{model: '@a'}]\nparameters: {weight: 1}\ntokenizer:\n  sorce: union\n  pad_to_multiple_of: 0\n  tokens:\n    x: {source: {kind: none}}\n    y: {force: true}\n    z: {source: {kind: model_token, model: '@a'}}\n",
        &[
            "line 5, column 3: unknown key `sorce` in `tokenizer`; did you mean `source`?",
            "line 6, column 23: `pad_to_multiple_of` should be a whole number",
            "line 8, column 24: `kind` of token `x` should be zero or model_token, found `none`",
            "line 9, column 5: token `y` is forced to a `source` that is missing",
            "line 10, column 17: the source of token `z` needs a `token` or a `token_id`",
        ],
    ),
    (
        "merge_method: linear\nmodels: [{model: '@a'}]\nparameters: {weight: 1}\ntokenizer_source: union\nchat_template: chatlm\n",
        &[
            "line 1, column 1: `chat_template: chatlm` is neither a name that is known nor a template; did you mean `chatml`?",
            "line 4, column 19: the tokenizer of `@a`: ",
        ],
    ),
];

#[test]
fn every_mistake_is_listed_with_its_place() {
    let root = tempfile::tempdir().unwrap();
    let root = root.path();
    models(root);
    let before = files(root);
    let at = format!("{}/", root.display());
    let path = tempfile::NamedTempFile::new().unwrap();
    assert!(MISTAKES.len() >= 30);
    let mut wrong = Vec::new();
    for (text, expected) in MISTAKES {
        std::fs::write(path.path(), text.replace('@', &at)).unwrap();
        let problems = match Merge::open(path.path()) {
            Err(MergeError::Config { problems, .. } | MergeError::Mismatch { problems, .. }) => problems,
            Err(other) => panic!("{text}\n{other}"),
            Ok(_) => panic!("{text}\nis accepted"),
        };
        let problems: Vec<String> = problems.iter().map(|p| placed(text, &at, p)).collect();
        let alike =
            problems.len() == expected.len() && problems.iter().zip(*expected).all(|(p, e)| p.starts_with(e));
        if !alike {
            wrong.push(format!("{text}\nfound\n{}\nexpected\n{}", problems.join("\n"), expected.join("\n")));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n\n"));
    assert_eq!(files(root), before, "nothing is written");
}

/// A problem with the folder as `@`, also in the count of columns.
fn placed(text: &str, at: &str, problem: &str) -> String {
    let found = problem.strip_prefix("line ").and_then(|p| p.split_once(", column "));
    let Some((line, (column, rest))) = found.and_then(|(l, p)| Some((l, p.split_once(':')?))) else {
        return problem.replace(at, "@");
    };
    let (line, column): (usize, usize) = (line.parse().unwrap(), column.parse().unwrap());
    let written = text.lines().nth(line - 1).unwrap_or_default();
    let mut left = column - 1;
    let mut before = 0;
    for c in written.chars() {
        if left == 0 {
            break;
        }
        left = left.saturating_sub(if c == '@' { at.len() } else { 1 });
        before += 1;
    }
    format!("line {line}, column {}:{}", before + left + 1, rest.replace(at, "@"))
}

fn files(root: &Path) -> Vec<std::path::PathBuf> {
    let mut found: Vec<_> = std::fs::read_dir(root).unwrap().map(|e| e.unwrap().path()).collect();
    found.sort();
    found
}
