//! Chat templates by the names that mergekit has for them.

/// The names.
pub(crate) const NAMES: &[&str] = &["alpaca", "chatml", "exaone", "llama3", "mistral"];

/// The template of this name.
pub(crate) fn by_name(name: &str) -> Option<&'static str> {
    Some(match name {
        "alpaca" => ALPACA,
        "chatml" => CHATML,
        "exaone" => EXAONE,
        "llama3" => LLAMA3,
        "mistral" => MISTRAL,
        _ => return None,
    })
}

const CHATML: &str = "{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
";

const ALPACA: &str = "{%- for message in messages -%}
{%- if message['role'] == 'system' -%}
{{- message['content'] + '\\n\\n' -}}
{%- elif message['role'] == 'user' -%}
{{- '### Instruction:\\n' + message['content'] + '\\n\\n' -}}
{%- elif message['role'] == 'assistant' -%}
{{- '### Response:\\n' + message['content'] + '\\n\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '### Response:\\n' -}}{%- endif -%}
";

const LLAMA3: &str = "{{- bos_token -}}
{%- for message in messages -%}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}
";

const MISTRAL: &str = "{{- bos_token -}}
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{{- ' ' + message['content'] | trim + eos_token -}}
{%- else -%}
{{- '[INST] ' + message['content'] | trim + ' [/INST]' -}}
{%- endif -%}
{%- endfor -%}
";

const EXAONE: &str = "{%- for message in messages -%}
{{- '[|' + message['role'] + '|]' + message['content'] -}}
{%- if message['role'] == 'user' -%}{{- '\\n' -}}{%- else -%}{{- '[|endofturn|]\\n' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '[|assistant|]' -}}{%- endif -%}
";
