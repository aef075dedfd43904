//! What the fuzz targets share: how random bytes become steps.

use arbitrary::{Arbitrary, Result, Unstructured};

/// As many steps as the bytes make, `MOST` at most.
///
/// `Vec`'s own way asks after each element whether there is another: of random bytes, it makes two steps on average, and
/// what goes wrong needs more.
pub fn steps<'a, T: Arbitrary<'a>, const MOST: usize>(bytes: &mut Unstructured<'a>) -> Result<Vec<T>> {
    let mut steps = Vec::new();
    while !bytes.is_empty() && steps.len() < MOST {
        steps.push(T::arbitrary(bytes)?);
    }
    Ok(steps)
}
