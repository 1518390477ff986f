#![no_main]

libfuzzer_sys::fuzz_target!(init: firebrick_fuzz::let_tokenizers_panic(), |data: &[u8]| {
    firebrick_fuzz::tokenizer_json(data);
});
