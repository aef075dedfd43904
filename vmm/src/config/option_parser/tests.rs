//! Tests of the option grammar.

use super::*;

const KEYS: &[Key] = &[Key::Value("size"), Key::Value("name"), Key::Value("list"), Key::Word("off")];

fn parse(text: &str) -> Result<Options, OptionError> {
    Options::parse("--test", text, KEYS)
}

#[test]
fn keys_and_words_are_told_apart() {
    let options = parse("size=1G,off").unwrap();
    assert_eq!(options.get::<ByteSized>("size"), Ok(Some(ByteSized(1 << 30))));
    assert!(options.has("off"));
    assert_eq!(options.get::<String>("name"), Ok(None));
    assert!(!parse("").unwrap().has("off"));
}

#[test]
fn an_unknown_key_is_named_with_the_accepted_ones() {
    let error = parse("sise=1").unwrap_err();
    assert_eq!(error.to_string(), "--test has no key 'sise'; it takes size, name, list, off");
}

#[test]
fn a_key_without_value_and_a_word_with_one_are_refused() {
    assert_eq!(parse("size").unwrap_err(), OptionError::MissingValue { option: "--test", key: "size" });
    assert_eq!(parse("off=1").unwrap_err(), OptionError::UnexpectedValue { option: "--test", key: "off" });
}

#[test]
fn quotes_and_brackets_protect_commas_and_equal_signs() {
    let options = parse(r#"name="a,b=c",list=["x,y",z]"#).unwrap();
    assert_eq!(options.get::<String>("name"), Ok(Some("a,b=c".into())));
    assert_eq!(options.get::<StringList>("list"), Ok(Some(StringList(vec!["x,y".into(), "z".into()]))));
}

#[test]
fn unclosed_quotes_and_brackets_are_refused() {
    for text in ["name=\"a", "list=[a", "list=a]", "list=[[a]"] {
        assert!(matches!(parse(text), Err(OptionError::Unbalanced { .. })), "{text}");
    }
}

#[test]
fn the_last_of_two_equal_keys_counts() {
    assert_eq!(parse("name=a,name=b").unwrap().get::<String>("name"), Ok(Some("b".into())));
}

#[test]
fn sizes_have_binary_suffixes_and_do_not_overflow() {
    for (text, size) in
        [("0", 0), ("512", 512), ("4k", 4096), ("64M", 64 << 20), ("17179869183G", u64::MAX - (1 << 30) + 1)]
    {
        assert_eq!(ByteSized::parse(text), Some(ByteSized(size)), "{text}");
    }
    for text in ["", "G", "1T", "-1", "+1", "1.5G", "17179869184G", "99999999999999999999"] {
        assert_eq!(ByteSized::parse(text), None, "{text}");
    }
}

#[test]
fn toggles_are_words_in_any_case() {
    assert_eq!(
        ["on", "TRUE", "Off", "false", ""].map(Toggle::parse),
        [true, true, false, false, false].map(|t| Some(Toggle(t)))
    );
    assert_eq!(Toggle::parse("yes"), None);
}

#[test]
fn integer_lists_have_ranges_and_an_end() {
    assert_eq!(IntegerList::parse("[0,2-4]"), Some(IntegerList(vec![0, 2, 3, 4])));
    assert_eq!(IntegerList::parse("7"), Some(IntegerList(vec![7])));
    assert_eq!(IntegerList::parse("[]"), Some(IntegerList(vec![])));
    for text in ["[4-2]", "[a]", "[1-]", "[1", "[0-99999999]", "[0-18446744073709551615]"] {
        assert_eq!(IntegerList::parse(text), None, "{text}");
    }
}

#[test]
fn pairs_may_hold_lists() {
    let expected = Tuples(vec![(0, IntegerList(vec![1, 2])), (1, IntegerList(vec![5]))]);
    assert_eq!(Tuples::<u32, IntegerList>::parse("[0@[1,2],1@[5]]"), Some(expected));
    assert_eq!(Tuples::<u32, IntegerList>::parse("[0]"), None);
}

#[test]
fn a_wrong_value_says_what_was_expected() {
    let error = parse("size=big").unwrap().get::<ByteSized>("size").unwrap_err();
    let message =
        "--test: 'big' is no value for size; it takes a number of bytes, or one followed by K, M or G";
    assert_eq!(error.to_string(), message);
    assert_eq!(u8::parse("256"), None);
}
