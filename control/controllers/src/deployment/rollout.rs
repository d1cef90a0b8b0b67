//! How large each ReplicaSet should be (pure).
use std::sync::Arc;

use k8s_openapi::api::apps::v1::{Deployment, ReplicaSet, RollingUpdateDeployment};

use super::revision::{DESIRED, MAXIMUM};
use super::{Sets, size, wanted};
use crate::objects::{annotation, by_creation, scaled};

type Sizes = Vec<(Arc<ReplicaSet>, i32)>;

fn rolling(deployment: &Deployment) -> Option<RollingUpdateDeployment> {
    let strategy = deployment.spec.as_ref()?.strategy.clone().unwrap_or_default();
    (strategy.type_.as_deref().unwrap_or("RollingUpdate") == "RollingUpdate").then(|| strategy.rolling_update.unwrap_or_default())
}

/// Surge and unavailability in pods; both being zero would stop the rollout, so one pod may then be unavailable.
fn limits(deployment: &Deployment) -> (i32, i32) {
    let Some(rolling) = rolling(deployment) else { return (0, 0) };
    let surge = scaled(rolling.max_surge.as_ref(), wanted(deployment), true).unwrap_or(0);
    let unavailable = scaled(rolling.max_unavailable.as_ref(), wanted(deployment), false).unwrap_or(0);
    if surge == 0 && unavailable == 0 { (0, 1) } else { (surge, unavailable) }
}

pub fn max_surge(deployment: &Deployment) -> i32 {
    limits(deployment).0
}

pub fn max_unavailable(deployment: &Deployment) -> i32 {
    if wanted(deployment) == 0 { 0 } else { limits(deployment).1.min(wanted(deployment)) }
}

fn available(set: &ReplicaSet) -> i32 {
    set.status.as_ref().and_then(|status| status.available_replicas).unwrap_or(0)
}

fn total<'a>(sets: impl Iterator<Item = &'a Arc<ReplicaSet>>) -> i32 {
    sets.map(|set| size(set)).sum()
}

/// The new set's next size when it has `current` pods and all sets have `total`.
pub fn new_size(deployment: &Deployment, current: i32, total: i32) -> i32 {
    let Some(rolling) = rolling(deployment) else { return wanted(deployment) };
    let surge = scaled(rolling.max_surge.as_ref(), wanted(deployment), true).unwrap_or(0);
    let room = wanted(deployment) + surge - total;
    if room <= 0 { current } else { current + room.min(wanted(deployment) - current) }
}

pub(super) fn scale_up_new(deployment: &Deployment, sets: &Sets) -> Sizes {
    let Some(new) = &sets.new else { return Vec::new() };
    let to = match size(new) {
        current if current >= wanted(deployment) => wanted(deployment),
        current => new_size(deployment, current, total(sets.all())),
    };
    if to == size(new) { Vec::new() } else { vec![(new.clone(), to)] }
}

/// Unhealthy pods of old sets first, since their going costs nothing; then as many as availability allows.
pub(super) fn scale_down_old(deployment: &Deployment, sets: &Sets) -> Sizes {
    let mut old: Vec<(Arc<ReplicaSet>, i32)> = sets.old.iter().filter(|set| size(set) > 0).map(|set| (set.clone(), size(set))).collect();
    let (Some(new), false) = (&sets.new, old.is_empty()) else { return Vec::new() };
    let least = wanted(deployment) - max_unavailable(deployment);
    let limit = total(sets.all()) - least - (size(new) - available(new));
    if limit <= 0 {
        return Vec::new();
    }
    old.sort_by(|left, right| by_creation(&left.0.metadata, &right.0.metadata));
    let mut cleaned = 0;
    for (set, to) in &mut old {
        let cut = (limit - cleaned).min(*to - available(set)).max(0);
        *to -= cut;
        cleaned += cut;
    }
    let mut spare: i32 = sets.all().map(|set| available(set)).sum::<i32>() - least;
    for (_, to) in &mut old {
        let cut = spare.min(*to).max(0);
        *to -= cut;
        spare -= cut;
    }
    old.retain(|(set, to)| size(set) != *to);
    old
}

fn desired(set: &ReplicaSet) -> Option<i32> {
    annotation(&set.metadata, DESIRED)?.parse().ok().filter(|number| *number >= 0)
}

/// Somebody changed the deployment's size, not (only) its template.
pub(super) fn is_scaling_event(deployment: &Deployment, sets: &Sets) -> bool {
    sets.all().filter(|set| size(set) > 0).filter_map(|set| desired(set)).any(|desired| desired != wanted(deployment))
}

fn is_saturated(deployment: &Deployment, set: Option<&Arc<ReplicaSet>>) -> bool {
    set.is_some_and(|set| {
        let wanted = wanted(deployment);
        size(set) == wanted && desired(set) == Some(wanted) && available(set) == wanted
    })
}

/// The sizes after a change of the deployment's size in the middle of a rollout: every set takes its share.
pub(super) fn proportional(deployment: &Deployment, sets: &Sets) -> Sizes {
    let active: Vec<_> = sets.all().filter(|set| size(set) > 0).cloned().collect();
    let latest = || sets.new.clone().or_else(|| sets.old.last().cloned());
    if active.len() <= 1 {
        let only = active.first().cloned().or_else(latest);
        return only.filter(|set| size(set) != wanted(deployment)).map(|set| (set, wanted(deployment))).into_iter().collect();
    }
    if is_saturated(deployment, sets.new.as_ref()) {
        return sets.old.iter().filter(|set| size(set) > 0).map(|set| (set.clone(), 0)).collect();
    }
    if rolling(deployment).is_none() {
        return Vec::new();
    }
    let allowed = if wanted(deployment) > 0 { wanted(deployment) + max_surge(deployment) } else { 0 };
    let to_add = allowed - total(active.iter());
    let mut order = active;
    // Larger sets first; among equals newer ones grow first and older ones shrink first.
    order.sort_by(|left, right| {
        let age = by_creation(&left.metadata, &right.metadata);
        size(right).cmp(&size(left)).then(if to_add > 0 { age.reverse() } else { age })
    });
    let mut added = 0;
    let mut sizes: Sizes = Vec::with_capacity(order.len());
    for set in order {
        let share = if to_add == 0 { 0 } else { share(deployment, &set, to_add, added) };
        added += share;
        sizes.push((set.clone(), size(&set) + share));
    }
    if let Some(first) = sizes.first_mut() {
        first.1 = (first.1 + to_add - added).max(0);
    }
    sizes
}

fn share(deployment: &Deployment, set: &ReplicaSet, to_add: i32, added: i32) -> i32 {
    if size(set) == 0 || to_add == added {
        return 0;
    }
    let fraction = fraction(deployment, set);
    let left = to_add - added;
    if to_add > 0 { fraction.min(left) } else { fraction.max(left) }
}

fn fraction(deployment: &Deployment, set: &ReplicaSet) -> i32 {
    if wanted(deployment) == 0 {
        return -size(set);
    }
    let maximum = wanted(deployment) + max_surge(deployment);
    let before = annotation(&set.metadata, MAXIMUM).and_then(|number| number.parse::<i32>().ok()).filter(|number| *number > 0);
    let Some(before) = before.or_else(|| deployment.status.as_ref().and_then(|status| status.replicas)).filter(|number| *number > 0) else {
        return 0;
    };
    let exact = f64::from(size(set)) * f64::from(maximum) / f64::from(before);
    exact.round() as i32 - size(set)
}

/// `set` with its new size and the annotations that tell for which size of the deployment; None when all is so.
pub fn resized(deployment: &Deployment, set: &ReplicaSet, to: i32) -> Option<ReplicaSet> {
    let mut updated = set.clone();
    updated.spec.get_or_insert_default().replicas = Some(to);
    let annotations = updated.metadata.annotations.get_or_insert_default();
    annotations.insert(DESIRED.into(), wanted(deployment).to_string());
    annotations.insert(MAXIMUM.into(), (wanted(deployment) + max_surge(deployment)).to_string());
    (updated != *set).then_some(updated)
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;
    use k8s_openapi::api::apps::v1::{DeploymentSpec, DeploymentStrategy};
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
    use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

    use super::*;

    fn deployment(replicas: i32, surge: i32, unavailable: i32) -> Deployment {
        Deployment {
            spec: Some(DeploymentSpec {
                replicas: Some(replicas),
                strategy: Some(DeploymentStrategy {
                    type_: Some("RollingUpdate".into()),
                    rolling_update: Some(RollingUpdateDeployment {
                        max_surge: Some(IntOrString::Int(surge)),
                        max_unavailable: Some(IntOrString::Int(unavailable)),
                    }),
                }),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    fn set(name: &str, created: i64, replicas: i32, available: i32, maximum: i32) -> Arc<ReplicaSet> {
        let mut set = ReplicaSet::default();
        set.metadata.name = Some(name.into());
        set.metadata.creation_timestamp = Some(Time(Timestamp::from_second(created).unwrap()));
        set.metadata.annotations = Some([(MAXIMUM.to_owned(), maximum.to_string()), (DESIRED.to_owned(), replicas.to_string())].into());
        set.spec.get_or_insert_default().replicas = Some(replicas);
        set.status.get_or_insert_default().available_replicas = Some(available);
        Arc::new(set)
    }

    fn named(sizes: Sizes) -> Vec<(String, i32)> {
        sizes.into_iter().map(|(set, to)| (set.metadata.name.clone().unwrap(), to)).collect()
    }

    #[test]
    fn a_rollout_goes_step_by_step_within_its_limits() {
        let deployment = deployment(10, 3, 2);
        let fresh = Sets { new: Some(set("new", 2, 0, 0, 0)), old: vec![set("old", 1, 10, 10, 0)] };
        assert_eq!(named(scale_up_new(&deployment, &fresh)), [("new".into(), 3)]);
        let surged = Sets { new: Some(set("new", 2, 3, 0, 0)), old: vec![set("old", 1, 10, 10, 0)] };
        assert!(scale_up_new(&deployment, &surged).is_empty());
        assert_eq!(named(scale_down_old(&deployment, &surged)), [("old".into(), 8)]);
        let stuck = Sets { new: Some(set("new", 2, 5, 0, 0)), old: vec![set("old", 1, 8, 8, 0)] };
        assert!(scale_down_old(&deployment, &stuck).is_empty(), "the new pods aren't available");
        let ill = Sets { new: Some(set("new", 2, 3, 3, 0)), old: vec![set("old", 1, 10, 4, 0)] };
        assert_eq!(named(scale_down_old(&deployment, &ill)), [("old".into(), 5)], "ill pods go first, up to the limit");
    }

    #[test]
    fn a_change_of_size_in_mid_rollout_is_shared_out() {
        let deployment = deployment(20, 3, 2);
        let sets = Sets { new: Some(set("new", 2, 5, 5, 13)), old: vec![set("old", 1, 8, 8, 13)] };
        assert!(is_scaling_event(&deployment, &sets));
        let sizes = named(proportional(&deployment, &sets));
        assert_eq!(sizes, [("old".into(), 14), ("new".into(), 9)]);
        let alone = Sets { new: Some(set("new", 2, 5, 5, 13)), old: vec![] };
        assert_eq!(named(proportional(&deployment, &alone)), [("new".into(), 20)]);
    }

    #[test]
    fn limits_never_stop_a_rollout() {
        assert_eq!(limits(&deployment(1, 0, 0)), (0, 1));
        assert_eq!(max_unavailable(&deployment(0, 1, 1)), 0);
        assert_eq!(max_unavailable(&deployment(2, 0, 5)), 2);
    }
}
