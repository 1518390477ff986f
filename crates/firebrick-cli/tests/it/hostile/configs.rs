//! Configurations that make no sense: plans, selectors, merges, settings on the command line, chat templates.

use super::{Case, Files, Odd, Valid};

const TRAIN: &str = "train --model m --data t.txt --window 8 --batch 1 --steps 1 --out out";
const QUANTIZE: &str =
    "quantize --model m --data t.txt --window 8 --windows 2 --method rtn --group 0 --out out.gguf";

pub(super) fn cases(valid: &Valid) -> Vec<Case> {
    let mut cases = Vec::new();
    plans(&valid.folder, &mut cases);
    selectors(&valid.folder, &mut cases);
    merges(&valid.folder, &mut cases);
    settings(&valid.folder, &mut cases);
    templates(&valid.folder, &mut cases);
    tasks(&valid.folder, &mut cases);
    training_data(&valid.folder, &mut cases);
    cases
}

/// A task in `t.toml` and its items in `d.jsonl`.
pub(super) const TASK: [&str; 2] = [
    "name = \"t\"\nkind = \"multiple_choice\"\ndata = \"d.jsonl\"\nprompt = \"{{q}}\"\nchoices = \"c\"\nanswer = \"a\"\nmetrics = [\"acc\"]\n",
    "{\"q\": \"the\", \"c\": [\"quick\", \"lazy\"], \"a\": 0}\n",
];

/// Verbs that read a task, training data in `d.jsonl`, and stages of `t.txt` in `s.json`.
pub(super) const LINES: [&str; 3] = [
    "eval --model m --task t.toml",
    "train --model m --data d.jsonl --window 8 --batch 1 --steps 1 --out out",
    "train --model m --data t.txt --stages s.json --window 8 --batch 1 --steps 1 --out out",
];

/// Evaluation tasks and their items.
fn tasks(files: &Files, cases: &mut Vec<Case>) {
    let [good, item] = TASK;
    let case = |name: &str, task: &str, data: &str, says: &[&str]| {
        Case::line(format!("task: {name}"), LINES[0], files, says).with("t.toml", task).with("d.jsonl", data)
    };
    let without = |key: &str| good.lines().filter(|l| !l.starts_with(key)).collect::<Vec<_>>().join("\n");
    let swapped = |from: &str, to: &str| good.replace(from, to);
    for (name, task, says) in [
        ("no TOML", "name = [".to_string(), "t.toml"),
        ("no prompt", without("prompt"), "`prompt` is missing"),
        ("an unknown kind", swapped("multiple_choice", "quiz"), "quiz"),
        ("an unknown key", format!("{good}shots = 3\n"), "shots"),
        ("a template that does not parse", swapped("{{q}}", "{% for %}"), "prompt"),
        ("a template without end", swapped("{{q}}", "{% for i in range(1000000000) %}x{% endfor %}"), "t"),
        ("a field that is not there", swapped("{{q}}", "{{nothing}}"), "undefined value"),
        ("no such data", swapped("d.jsonl", "e.jsonl"), "e.jsonl"),
        ("data outside", swapped("d.jsonl", "../../../../etc/hostname"), "hostname"),
    ] {
        cases.push(case(name, &task, item, &[says]));
    }
    for (name, data, says) in [
        ("an item that is no JSON", "{".to_string(), "d.jsonl"),
        ("an item that is a list", "[1]".to_string(), "d.jsonl"),
        ("no items", String::new(), "d.jsonl"),
        ("an answer that is none", item.replace("\"a\": 0", "\"a\": 7"), "7"),
        ("an item without answer", r#"{"q": "the", "c": ["quick", "lazy"]}"#.to_string(), "a"),
        ("choices that are none", item.replace("[\"quick\", \"lazy\"]", "5"), "c"),
    ] {
        cases.push(case(name, good, &data, &[says]));
    }
    cases.push(Case::line(
        "task: a built-in that is none",
        "eval --model m --task nothing-known",
        files,
        &["nothing-known"],
    ));
}

/// JSONL of texts and chats, and the stages of a mixture.
fn training_data(files: &Files, cases: &mut Vec<Case>) {
    for (name, data, says) in [
        ("no JSON", &b"{\"text\": \"the\"}\n{"[..], "d.jsonl:2"),
        ("a list", b"[\"the\"]", "d.jsonl:1"),
        ("nothing known", b"{\"txt\": \"the\"}", "d.jsonl:1"),
        ("a text that is a number", b"{\"text\": 5}", "d.jsonl:1"),
        ("a prompt alone", b"{\"prompt\": \"the\"}", "completion"),
        ("messages that are none", b"{\"messages\": [5]}", "d.jsonl:1"),
        ("nothing to learn", b"{\"messages\": [{\"role\": \"user\", \"content\": \"the\"}]}", "`assistant`"),
        ("no UTF-8", b"{\"text\": \"\xff\"}", "d.jsonl"),
        ("nothing", b"", "d.jsonl"),
        ("deep", &[b'['; 100_000], "d.jsonl:1"),
    ] {
        cases.push(Case::line(format!("JSONL: {name}"), LINES[1], files, &[says]).with("d.jsonl", data));
    }
    for (text, says) in [
        ("{", "s.json"),
        ("{}", "s.json"),
        ("[]", "s.json"),
        (r#"[{"length": 1, "draws": [{"source": "u", "weight": 1, "share": 1}]}]"#, "`u`"),
        (r#"[{"length": 1, "draws": []}]"#, "s.json"),
        (r#"[{"length": -1, "draws": [{"source": "t", "weight": 1, "share": 1}]}]"#, "length"),
        (r#"[{"length": 1, "draws": [{"source": "t", "weight": -1, "share": 1}]}]"#, "weight"),
        (r#"[{"length": 1, "draws": [{"source": "t", "weight": 1, "share": 2}]}]"#, "share"),
    ] {
        cases.push(Case::line(format!("stages: {text}"), LINES[2], files, &[says]).with("s.json", text));
    }
}

fn plans(files: &Files, cases: &mut Vec<Case>) {
    let rule = |settings: &str| format!("version = 1\n[[rules]]\nselect = \"attn.q\"\n{settings}\n");
    let deep = format!("version = 1\na = {}", "[".repeat(100_000));
    let toml = [
        ("rules = [", "line 1"),
        (deep.as_str(), "line 2"),
        ("", "version"),
        ("version = 2\n", "line 1: version"),
        ("version = \"1\"\n", "line 1: version"),
        ("version = -1\n", "line 1: version"),
        ("version = 1\nrulez = []\n", "line 2: rulez: unknown key; did you mean `rules`"),
        ("version = 1\nrules = 5\n", "line 2: rules"),
        ("version = 1\nrules = [1, [], \"x\"]\n", "rules[2]"),
        ("version = 1\n[[rules]]\nrank = 8\n", "line 2: rules[0].select: missing"),
        (&rule("rnk = 8"), "line 4: rules[0].rnk"),
        (&rule("rank = 0"), "line 4: rules[0].rank: rank 0"),
        (&rule("rank = -8"), "line 4: rules[0].rank"),
        (&rule("rank = 1.5"), "line 4: rules[0].rank"),
        (&rule("rank = 99999999999999999999"), "line 4"),
        (&rule("rank = 1000000000000"), "rank 1000000000000"),
        (&rule("rank = 8\nalpha = inf"), "line 5: rules[0].alpha"),
        (&rule("rank = 8\ndropout = 1.0"), "line 5: rules[0].dropout"),
        (&rule("bits = 33"), "line 4: rules[0].bits: bits 33"),
        (&rule("density = 0.0"), "line 4: rules[0].density"),
        (&rule("learning_rate = nan"), "line 4: rules[0].learning_rate"),
        (&rule("experts = 2\ntop_k = 3"), "line 5: rules[0].top_k"),
        (&rule("frozen = 1"), "line 4: rules[0].frozen"),
        (&rule("rank = 8\nrank = 9"), "line 5"),
        (&rule("bits = 8"), "rank"),
    ];
    for (text, says) in toml {
        let name = format!("plan.toml: {}", text.chars().take(60).collect::<String>());
        cases.push(Case::line(name, &format!("{TRAIN} --plan p.toml"), files, &[says]).with("p.toml", text));
    }
    let json = [
        ("", "line 1"),
        ("[]", "a plan is a table"),
        ("{\"version\": 1, \"version\": 2}", "version"),
        ("{\"version\": 1, \"rules\": [{\"select\": 5}]}", "rules[0].select"),
        ("{\"version\": 1, \"rules\": [{\"select\": \"attn.q\", \"bits\": \"four\"}]}", "rules[0].bits"),
        ("{\"version\": 1, \"rules\": [{\"select\": \"attn.q\", \"bits\": 33}]}", "bits 33"),
    ];
    for (text, says) in json {
        let line = format!("{QUANTIZE} --plan p.json");
        cases.push(
            Case::line(format!("plan.json: {text}"), &line, files, &["p.json", says]).with("p.json", text),
        );
    }
    let deep = "{\"rules\":".repeat(100_000);
    let line = format!("{QUANTIZE} --plan p.json");
    cases.push(Case::line("plan.json: deep", &line, files, &["p.json", "line 1"]).with("p.json", deep));
    let line = |name: &str| format!("{TRAIN} --plan {name}");
    let at =
        |name: &str, says: &[&str]| Case::line(format!("plan {name} {says:?}"), &line(name), files, says);
    cases.push(at("p.toml", &["p.toml", "byte 3"]).with("p.toml", b"v =\xff".to_vec()));
    cases.push(at("p.toml", &["p.toml", "line 1"]).with("p.toml", b"v =\0".to_vec()));
    cases.push(at("p.txt", &["p.txt", ".toml or .json"]).with("p.txt", "version = 1"));
    cases.push(at("none.toml", &["none.toml"]));
    cases.push(at("p.toml", &["p.toml", "directory"]).odd("p.toml", Odd::Folder));
    cases.push(at("p.toml", &["p.toml"]).odd("p.toml", Odd::Link("p.toml")));
    cases.push(at("p.toml", &["p.toml", "not a regular file"]).odd("p.toml", Odd::Link("/dev/zero")));
    cases.push(at("p.toml", &["p.toml", "not a regular file"]).odd("p.toml", Odd::Pipe));
}

fn selectors(files: &Files, cases: &mut Vec<Case>) {
    let long = "attn.q,".repeat(20_000);
    let many = format!("re:{}", "(a{500}){500}".repeat(5));
    let braces = "layers.{".repeat(5_000);
    for (select, says) in [
        ("", "select"),
        ("layers", "which layers"),
        ("layers.9.attn", "layers 0-1"),
        ("layers.-3", "layers 0-1"),
        ("layers.99999999999", "no model has a layer"),
        ("layers.{0,1", "expected `,` or `}`"),
        ("layers.1-0", "empty range"),
        ("atn.q", "did you mean `attn`"),
        ("mlp.experts.-1", "expert"),
        ("attn.q.weight.x.y", "segments"),
        ("head, layers.0.head", "once per model"),
        ("re:", "regular expression"),
        ("re:((", "not a regular expression"),
        (&many, "not a regular expression"),
        ("re:nothing-is-called-so", "nothing-is-called-so"),
        (&long, "at most 65536"),
        (&braces, "expected"),
        ("attn.q\\u0000", "select"),
    ] {
        let name: String = format!("selector {select}").chars().take(60).collect();
        let text = format!("version = 1\n[[rules]]\nselect = \"{select}\"\nrank = 2\n");
        let line = format!("{TRAIN} --plan p.toml");
        cases.push(Case::line(name, &line, files, &["p.toml", says]).with("p.toml", text));
    }
}

fn merges(files: &Files, cases: &mut Vec<Case>) {
    let linear = |rest: &str| {
        format!("merge_method: linear\nmodels:\n  - model: m\n    parameters: {{weight: 1.0}}\n{rest}")
    };
    let weight = |weight: &str| {
        format!("merge_method: linear\nmodels:\n  - model: m\n    parameters: {{weight: {weight}}}\n")
    };
    let bomb: String = "a0: &a0 [x, x]\n".to_string()
        + &(1..60).map(|i| format!("a{i}: &a{i} [*a{0}, *a{0}]\n", i - 1)).collect::<String>();
    let deep = format!("merge_method: {}", "[".repeat(100_000));
    let nested = weight(&format!("{}1{}", "[{filter: q, value: ".repeat(3_000), "}]".repeat(3_000)));
    let yaml: &[(&str, &str)] = &[
        ("", "the text is empty"),
        ("[1, 2]", "should be a map"),
        ("merge_method: [\n", "line"),
        ("merge_method: linear\n\tmodels: 5\n", "line"),
        (&bomb, "line"),
        (&deep, "line"),
        (&nested, "line"),
        ("merge_method: *nothing\n", "line"),
        ("merge_method: melt\nmodels: []\n", "`melt`"),
        ("models: []\n", "`merge_method` is missing"),
        ("merge_method: linear\n", "`models`"),
        ("merge_method: linear\nmodels: {}\n", "`models`"),
        ("merge_method: linear\nmodels: []\n", "`models` of the configuration is empty"),
        ("merge_method: linear\nmodels: [{}]\n", "`model` is missing"),
        ("merge_method: linear\nmodels: [{model: m}]\n", "no `weight`"),
        (&weight("heavy"), "line 4, column 26: `weight`"),
        (&weight(".nan"), "line 4, column 26"),
        (&weight("1e999"), "line 4, column 26"),
        (&weight("0.0"), "add up to 0"),
        (&weight("[{filter: nothing-is-called-so, value: 1}]"), "no filter takes"),
        (&weight("[]"), "`weight` is an empty list"),
        (&linear("dtype: int4\n"), "int4"),
        (&linear("dtpye: float32\n"), "dtpye"),
        (&linear("slices: []\n"), "slices"),
        (&linear("numerics: exact\n"), "exact"),
        (&linear("merge_method: linear\n"), "line"),
        (&linear("tokenizer_source: nowhere\n"), "nowhere"),
        (&linear("base_model: m+adapter\n"), "m+adapter"),
        ("merge_method: task_arithmetic\nmodels: [{model: m, parameters: {weight: 1}}]\n", "base_model"),
    ];
    for (text, says) in yaml {
        let name: String = format!("merge {text:?}").chars().take(90).collect();
        cases.push(Case::line(name, "merge x.yml out", files, &["x.yml", says]).with("x.yml", *text));
    }
    let case =
        |name: &str, says: &[&str]| Case::line(format!("merge {name}"), "merge x.yml out", files, says);
    cases.push(case("not UTF-8", &["x.yml", "byte 2"]).with("x.yml", b"a:\xff".to_vec()));
    cases.push(case("a folder", &["x.yml", "directory"]).odd("x.yml", Odd::Folder));
    cases.push(case("a pipe", &["x.yml", "not a regular file"]).odd("x.yml", Odd::Pipe));
    cases.push(case("endless", &["x.yml", "not a regular file"]).odd("x.yml", Odd::Link("/dev/zero")));
    cases.push(
        case("no such model", &["nowhere"]).with("x.yml", weight("1").replace("model: m", "model: nowhere")),
    );
    cases.push(
        case("a model that is text", &["t.txt"])
            .with("x.yml", weight("1").replace("model: m", "model: t.txt")),
    );
    let other = "models:\n  - {model: m, parameters: {weight: 1}}\n  - {model: other, parameters: {weight: 1}}\nmerge_method: linear\n";
    let header = br#"{"model.norm.weight":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#;
    let file = [&(header.len() as u64).to_le_bytes()[..], header, &[0; 8]].concat();
    let unlike = case("unlike models", &["model.norm.weight", "[2]", "lacks `model.embed_tokens.weight`"]);
    cases.push(unlike.with("x.yml", other).with("other/model.safetensors", file));
    cases.push(
        case("a side file that is a folder", &["merges.txt"])
            .with("x.yml", weight("1"))
            .odd("m/merges.txt", Odd::Folder),
    );
    cases.push(
        case("a side file without end", &["merges.txt"])
            .with("x.yml", weight("1"))
            .odd("m/merges.txt", Odd::Pipe),
    );
    let stages = "name: one\nmerge_method: linear\nmodels: [{model: m}]\nparameters: {weight: 1}\n---\nmerge_method: linear\nmodels: [{model: one}, {model: nowhere}]\nparameters: {weight: 1}\n";
    let later = case("a model that the last document lacks", &["x.yml", "line 7, column 24", "nowhere"]);
    cases.push(later.with("x.yml", stages));
    let own = Case::line("merge into a model", "merge x.yml m", files, &["--overwrite"]);
    cases.push(own.with("x.yml", weight("1")));
}

/// What the command line asks for.
fn settings(files: &Files, cases: &mut Vec<Case>) {
    for (extra, says) in [
        ("--learning-rate nan", "learning_rate"),
        ("--learning-rate=-1", "learning_rate"),
        ("--batch 0", "batch"),
        ("--batch 1000000000000000", "batch"),
        ("--accumulate 0", "accumulate"),
        ("--window 1", "window"),
        ("--window 1000000", "t.txt"),
        ("--rank 0", "--rank"),
        ("--rank 1000000000000", "rank 1000000000000"),
        ("--alpha inf", "--alpha"),
        ("--dropout 1", "--dropout"),
        ("--dropout nan", "--dropout"),
        ("--steps many", "--steps"),
        ("--method dora", "--method"),
        ("--threads 0", "--threads"),
        ("--max-memory much", "--max-memory"),
        ("--seed=-1", "--seed"),
        ("--data missing.txt", "missing.txt"),
        ("--data m", "m: "),
    ] {
        let (flag, _) = extra.split_once([' ', '=']).unwrap();
        let mut words: Vec<String> = TRAIN.split(' ').map(String::from).collect();
        if let Some(at) = words.iter().position(|w| w == flag) {
            words.drain(at..at + 2);
        }
        words.retain(|w| w != "--threads");
        words.extend(extra.split(' ').map(String::from));
        cases.push(Case::new(format!("train {extra}"), words, files, &[says]));
    }
    for (name, bytes, says) in [
        ("d.txt", &b""[..], "no text"),
        ("d.txt", b"a\xffb", "offset 1"),
        ("d.jsonl", b"{\"text\": \"a\"}\n{\"txt\": 1}\n", "d.jsonl:2"),
        ("d.jsonl", b"{\"text\": \"a\"}\n{", "d.jsonl:2"),
    ] {
        let line = TRAIN.replace("t.txt", name);
        cases.push(Case::line(format!("data {name} {says}"), &line, files, &[name, says]).with(name, bytes));
    }
    for (line, says) in [
        ("generate --model m --prompt x --temperature nan", "temperature"),
        ("generate --model m --prompt x --temperature=-1", "temperature"),
        ("generate --model m --prompt x --top-p 2", "top_p"),
        ("generate --model m --prompt x --max-tokens 1000000000000000", "context"),
        ("eval --model m --data t.txt --window 0", "--window"),
        ("eval --model m --data t.txt --window 8 --batch 0", "--batch"),
        ("eval --model m --data t.txt --window 8 --logits t.txt", "t.txt"),
        ("quantize --model m --data t.txt --window 8 --bits 7 --out out", "--bits 7"),
        ("prune --model m --data t.txt --window 8 --drop block --count 5 --out out", "--count 5"),
        ("prune --model m --data t.txt --window 8 --drop bones --count 1 --out out", "bones"),
        ("profile --model m --data t.txt --window 8 --mean-bits nan --out out", "bits"),
        ("profile --model m --data t.txt --window 8 --mean-rank=-5 --out out", "rank"),
        ("convert m out --type q9", "q9"),
        ("transplant m m --out out --method melt", "`melt`"),
        ("transplant m m --out out --k 0", "--k 0"),
        ("convert m out --max-memory 1", "memory"),
        ("inspect m --device quantum", "quantum"),
    ] {
        cases.push(Case::line(line, line, files, &[says]));
    }
}

fn templates(files: &Files, cases: &mut Vec<Case>) {
    let long = "{{ 1 }}".repeat(20_000);
    let parens = format!("{{{{ {}1{} }}}}", "(".repeat(20_000), ")".repeat(20_000));
    for (template, says) in [
        ("{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}", "fuel"),
        ("{% for i in range(1000000000) %}{% endfor %}", "range"),
        ("{% macro m(x) %}{{ m(x) }}{% endmacro %}{{ m(1) }}", "chat_template:1"),
        ("{% macro m(x) %}{{ m(x ~ x) }}{% endmacro %}{{ m('ab') }}", ""),
        ("{% for i in range(100000) %}{{ 'x' * 1000 }}{% endfor %}", "exceeds"),
        ("{{ 'x' * 1000000000000 }}", "too large"),
        ("{{ messages | tojson(indent=100000000) * 1000000 }}", "chat_template:1"),
        (
            "{% set ns = namespace(s='ab') %}{% for i in range(90) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}",
            "",
        ),
        (
            "{% set ns = namespace(s=[1]) %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}{{ ns.s | length }}",
            "",
        ),
        (
            "{% set ns = namespace(s=[1]) %}{% for i in range(60) %}{% set ns.s = [ns.s, ns.s] %}{% endfor %}{{ ns.s }}",
            "too much",
        ),
        (
            "{% set ns = namespace(s=[1]) %}{% for i in range(60) %}{% set ns.s = [ns.s, ns.s] %}{% endfor %}{{ ns.s | tojson }}",
            "too much",
        ),
        ("{{ (['x' * 1000] * 1000000000) | join }}", ""),
        ("{{ 'x' * 10000 | replace('x', 'y' * 10000) }}", ""),
        ("{{ 'x'.join(range(100000)) ~ 'z' }}{% include 'other' %}", "chat_template:1"),
        ("{% include '/etc/passwd' %}", "chat_template:1"),
        ("{% for m in messages %}{{ m.content }", "chat_template:1"),
        ("{{ raise_exception('only \u{1b}[2J kings may speak') }}", "kings may speak"),
        ("{{ nothing.at.all }}", "chat_template:1"),
        ("{% set ns = namespace() %}{% set ns.x = ns %}{{ ns }}", "too deep"),
        ("{% set ns = namespace() %}{% set ns.x = ns %}{{ ns | tojson }}", "nested deeper"),
        (&long, "65536 allowed"),
        (&parens, "chat_template:1"),
    ] {
        let name: String = format!("template {template}").chars().take(110).collect();
        let line = "generate --model m --prompt x --chat --max-tokens 1";
        let case = Case::line(name, line, files, &["m", "chat template", says]);
        cases.push(case.with("m/chat_template.jinja", template));
    }
}
