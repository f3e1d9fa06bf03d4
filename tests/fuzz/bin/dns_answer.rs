#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| tencrypt_fuzz::dns_answer(bytes));
