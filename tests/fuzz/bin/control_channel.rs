#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| tencrypt_fuzz::control_channel(bytes));
