//! The life of one pod on this node, without its doing: events in, effects out.
//!
//! A pod is synced until it's told to end or has ended by itself; then its containers are stopped, then what it had on the node is
//! taken away, then the API server may forget it. No stage is left backwards.

/// How far the pod is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// Containers are kept as the spec wants them.
    Syncing,
    /// Containers are being stopped.
    Terminating,
    /// All are stopped; volumes, cgroups and the like go.
    CleaningUp,
    /// Nothing is left on the node. The record stays while the API server still has the pod.
    Finished,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct State {
    pub stage: Stage,
    /// Seconds for the containers to end, once termination began.
    pub grace: Option<i64>,
    /// The pod is to be removed from the API server when all is done.
    pub deleted: bool,
    /// The API server (or the manifest folder) no longer has the pod.
    pub gone: bool,
    /// An operation is under way.
    busy: bool,
    /// Something happened meanwhile that the operation may not have seen.
    dirty: bool,
}

impl Default for State {
    fn default() -> Self {
        Self { stage: Stage::Syncing, grace: None, deleted: false, gone: false, busy: false, dirty: false }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The spec or something that the pod depends on changed, a probe turned, time has come.
    Changed,
    /// The API server wants the pod gone within so many seconds.
    DeletionRequested {
        grace: i64,
    },
    /// The pod is in its last phase: all its containers ended, or it was refused or evicted.
    Ended {
        grace: i64,
    },
    /// The object vanished.
    Gone {
        grace: i64,
    },
    Synced,
    /// Containers are stopped; false: something failed.
    Stopped(bool),
    /// The node holds nothing of the pod any more; false: something failed.
    CleanedUp(bool),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Give up the operation under way.
    Abort,
    Sync,
    Stop {
        grace: i64,
    },
    CleanUp,
    /// Remove the API object.
    DeleteObject,
    /// The worker has no more to do.
    Forget,
    /// Look again after a while: the last try failed.
    RetryLater,
}

/// One step. Effects are to be carried out in order.
pub fn step(mut state: State, event: Event) -> (State, Vec<Effect>) {
    let mut effects = Vec::new();
    match event {
        Event::Changed => match state.stage {
            _ if state.busy => state.dirty = true,
            Stage::Finished => finish(&state, &mut effects),
            _ => begin(&mut state, &mut effects),
        },
        Event::DeletionRequested { grace } => {
            state.deleted = true;
            terminate(&mut state, grace, &mut effects);
        }
        Event::Ended { grace } => terminate(&mut state, grace, &mut effects),
        Event::Gone { grace } => {
            state.gone = true;
            terminate(&mut state, grace, &mut effects);
        }
        Event::Synced => {
            state.busy = false;
            if std::mem::take(&mut state.dirty) && state.stage == Stage::Syncing {
                begin(&mut state, &mut effects);
            }
        }
        Event::Stopped(true) if state.stage == Stage::Terminating => {
            state.busy = false;
            state.stage = Stage::CleaningUp;
            begin(&mut state, &mut effects);
        }
        Event::CleanedUp(true) if state.stage == Stage::CleaningUp => {
            state.busy = false;
            state.stage = Stage::Finished;
            finish(&state, &mut effects);
        }
        Event::Stopped(_) | Event::CleanedUp(_) => {
            state.busy = false;
            effects.push(Effect::RetryLater);
        }
    }
    (state, effects)
}

/// Starts the operation of the stage.
fn begin(state: &mut State, effects: &mut Vec<Effect>) {
    state.busy = true;
    state.dirty = false;
    effects.push(match state.stage {
        Stage::Syncing => Effect::Sync,
        Stage::Terminating => Effect::Stop { grace: state.grace.unwrap_or(0) },
        Stage::CleaningUp | Stage::Finished => Effect::CleanUp,
    });
}

fn terminate(state: &mut State, grace: i64, effects: &mut Vec<Effect>) {
    match state.stage {
        Stage::Syncing => {
            if std::mem::take(&mut state.busy) {
                effects.push(Effect::Abort);
            }
            state.stage = Stage::Terminating;
            state.grace = Some(grace);
            begin(state, effects);
        }
        // A grace period is only ever shortened.
        Stage::Terminating if state.grace.is_some_and(|before| grace < before) => {
            state.grace = Some(grace);
            if std::mem::take(&mut state.busy) {
                effects.push(Effect::Abort);
            }
            begin(state, effects);
        }
        Stage::Terminating | Stage::CleaningUp => {}
        Stage::Finished => finish(state, effects),
    }
}

fn finish(state: &State, effects: &mut Vec<Effect>) {
    if state.gone {
        effects.push(Effect::Forget);
    } else if state.deleted {
        effects.push(Effect::DeleteObject);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs events through and gives the effects of each.
    fn run(events: &[Event]) -> Vec<Vec<Effect>> {
        let mut state = State::default();
        events
            .iter()
            .map(|event| {
                let (next, effects) = step(state.clone(), event.clone());
                state = next;
                effects
            })
            .collect()
    }

    #[test]
    fn a_change_during_a_sync_is_synced_after_it() {
        let effects = run(&[Event::Changed, Event::Changed, Event::Synced, Event::Synced]);
        assert_eq!(effects, [vec![Effect::Sync], vec![], vec![Effect::Sync], vec![]]);
    }

    #[test]
    fn deletion_interrupts_the_sync_and_goes_through_all_stages() {
        let effects = run(&[
            Event::Changed,
            Event::DeletionRequested { grace: 30 },
            Event::Changed,
            Event::Stopped(true),
            Event::CleanedUp(true),
            Event::Gone { grace: 0 },
        ]);
        assert_eq!(
            effects,
            [
                vec![Effect::Sync],
                vec![Effect::Abort, Effect::Stop { grace: 30 }],
                vec![],
                vec![Effect::CleanUp],
                vec![Effect::DeleteObject],
                vec![Effect::Forget],
            ]
        );
    }

    #[test]
    fn the_grace_period_is_only_shortened() {
        let effects =
            run(&[Event::DeletionRequested { grace: 30 }, Event::DeletionRequested { grace: 60 }, Event::DeletionRequested { grace: 1 }]);
        assert_eq!(effects, [vec![Effect::Stop { grace: 30 }], vec![], vec![Effect::Abort, Effect::Stop { grace: 1 }]]);
    }

    #[test]
    fn an_ended_pod_stays_until_it_is_deleted() {
        let effects = run(&[
            Event::Changed,
            Event::Ended { grace: 30 },
            Event::Stopped(true),
            Event::CleanedUp(true),
            Event::Changed,
            Event::DeletionRequested { grace: 30 },
        ]);
        assert_eq!(effects[3..], [vec![], vec![], vec![Effect::DeleteObject]]);
    }

    #[test]
    fn failures_are_retried_in_place() {
        let effects = run(&[
            Event::Gone { grace: 0 },
            Event::Stopped(false),
            Event::Changed,
            Event::Stopped(true),
            Event::CleanedUp(false),
            Event::Changed,
        ]);
        assert_eq!(
            effects,
            [
                vec![Effect::Stop { grace: 0 }],
                vec![Effect::RetryLater],
                vec![Effect::Stop { grace: 0 }],
                vec![Effect::CleanUp],
                vec![Effect::RetryLater],
                vec![Effect::CleanUp],
            ]
        );
    }
}
