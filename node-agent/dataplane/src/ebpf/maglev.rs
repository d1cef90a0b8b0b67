//! Maglev tables (Eisenbud and others, NSDI 2016): which backend a connection's hash means, on every node alike and hardly changed by
//! backends that come and go. Pure.
//!
//! Each backend has its own order of preference among the places; in turn each takes the first that is still free.
use outrigger_abi as abi;
use outrigger_logic::hash;

/// Numbers of places: primes, so that every step from place to place reaches all. Few sizes, since a table of another size is another table
/// altogether; each fills whole blocks but for a place or two.
const SIZES: [u32; 3] = [1021, 8191, 65_521];
/// With so many places for each backend their shares differ by about one in a hundred.
const PLACES: usize = 100;

/// How many places so many backends get. None where nothing has to be chosen, or where there are more backends than places.
pub fn places(backends: usize) -> u32 {
    let [.., largest] = SIZES;
    match backends {
        0 | 1 => 0,
        _ => SIZES.into_iter().find(|size| *size as usize >= backends * PLACES).unwrap_or(if backends > largest as usize {
            0
        } else {
            largest
        }),
    }
}

/// The blocks that hold a table of `count` places.
pub fn blocks(count: u32) -> u32 {
    count.div_ceil(abi::MAGLEV_BLOCK)
}

/// The smallest of the tables' sizes, in blocks, that holds so many of them.
pub fn piece(blocks_wanted: u32) -> u32 {
    let [.., largest] = SIZES;
    SIZES.into_iter().map(blocks).find(|size| *size >= blocks_wanted).unwrap_or(blocks(largest))
}

/// For each place the index of a backend. `backends` are sorted: whose turn is first decides over a few places.
pub fn table(backends: &[abi::Endpoint]) -> Vec<abi::MaglevBlock> {
    debug_assert!(backends.is_sorted_by_key(abi::Endpoint::sort_key));
    let size = places(backends.len());
    let mut blocks = vec![abi::MaglevBlock::default(); blocks(size) as usize];
    let mut taken = vec![false; size as usize];
    let mut turns: Vec<_> = backends.iter().map(|backend| Preference::of(backend, size)).collect();
    let mut left = size;
    while left > 0 {
        for (index, turn) in turns.iter_mut().enumerate().take(left as usize) {
            while std::mem::replace(&mut taken[turn.place as usize], true) {
                turn.place = (turn.place + turn.step) % size;
            }
            blocks[(turn.place / abi::MAGLEV_BLOCK) as usize].0[(turn.place % abi::MAGLEV_BLOCK) as usize] = index as u16;
            left -= 1;
        }
    }
    blocks
}

/// Where a backend's next wish is, and how far it is from one to the next.
struct Preference {
    place: u32,
    step: u32,
}

impl Preference {
    fn of(backend: &abi::Endpoint, size: u32) -> Self {
        let first = hash::endpoint(backend);
        let second = hash::mix(first, 1);
        Self { place: (first % u64::from(size)) as u32, step: (second % u64::from(size - 1)) as u32 + 1 }
    }
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::*;

    fn backends(count: u32) -> Vec<abi::Endpoint> {
        let ip = |n: u32| IpAddr::from([10, 244, (n / 250) as u8, (n % 250) as u8]);
        (0..count).map(|n| abi::Endpoint::new(ip(n).into(), abi::Port::new(8080))).collect()
    }

    /// The backend of each place.
    fn filled(backends: &[abi::Endpoint]) -> Vec<abi::Endpoint> {
        let blocks = table(backends);
        (0..places(backends.len())).map(|place| backends[blocks[(place / abi::MAGLEV_BLOCK) as usize].get(place) as usize]).collect()
    }

    #[test]
    fn tables_grow_in_few_steps() {
        let sizes: Vec<_> = [0, 1, 2, 10, 11, 81, 82, 655, 5000, 65_521, 65_522].into_iter().map(places).collect();
        assert_eq!(sizes, [0, 0, 1021, 1021, 8191, 8191, 65_521, 65_521, 65_521, 65_521, 0]);
        assert_eq!(SIZES.map(blocks), [32, 256, 2048]);
        assert_eq!([1, 32, 33, 256, 257, 9999].map(piece), [32, 32, 256, 256, 2048, 2048]);
    }

    #[test]
    fn shares_differ_by_one_in_a_hundred() {
        for count in [2, 3, 7, 10, 11, 50, 81, 82, 300, 655] {
            let backends = backends(count);
            let table = filled(&backends);
            let mut shares = std::collections::HashMap::new();
            table.iter().for_each(|backend| *shares.entry(backend).or_insert(0_u32) += 1);
            let (least, most) = (shares.values().min().unwrap(), shares.values().max().unwrap());
            assert!(shares.len() == count as usize && most - least <= 1, "{count}: {least} to {most} of {}", table.len());
        }
    }

    #[test]
    fn a_backend_that_goes_takes_hardly_more_than_its_own_places_along() {
        for count in [3_u32, 4, 10, 40, 81, 300] {
            let all = backends(count);
            for gone in [0, count as usize / 2, count as usize - 1] {
                let mut rest = all.clone();
                rest.remove(gone);
                let (before, after) = (filled(&all), filled(&rest));
                let moved = before.iter().zip(&after).filter(|(before, after)| before != after).count();
                let own = before.iter().filter(|backend| **backend == all[gone]).count();
                let others = (moved - own) as f64 / before.len() as f64;
                assert!(others < 0.025, "{count} without {gone}: {others} of the others' places");
            }
        }
    }

    /// Nodes of all versions have to agree.
    #[test]
    fn a_table_is_the_same_for_ever() {
        let digest = |count| table(&backends(count)).iter().flat_map(|block| block.0).fold(0, |sum, index| hash::mix(sum, index.into()));
        assert_eq!([2, 10, 82].map(digest), [15403752669063129833, 13161033033385970267, 15923692230632048105]);
    }
}
