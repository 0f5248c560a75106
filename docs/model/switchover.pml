/*
 * Who may run a guest while it moves. docs/decisions/switchover.md explains the protocol. tests/test_model.py checks
 * this file with spin, and compares its statuses and their changes with corefw/states.py and the engine's tables.
 *
 * Properties (at the end):
 *     at_most_one      both sides never run the guest at the same time
 *     one_in_the_end   if both engines live and faults cease, one side runs it in the end; and the source has ended,
 *                      unless the destination is a QEMU, which tells the outcome only once
 *
 * Not modelled: what the sections say, how much RAM is left, colo, a second migration after the first.
 */

/* MigrationStatus of corefw/states.py: s is the source's, d the destination's. */
mtype = { SETUP, ACTIVE, PRE_SWITCHOVER, DEVICE, POSTCOPY_ACTIVE, POSTCOPY_PAUSED, POSTCOPY_RECOVER_SETUP,
          POSTCOPY_RECOVER, COMPLETED, CANCELLING, CANCELLED, FAILING, FAILED };
mtype s = SETUP, d = SETUP;

/* Messages. PACKAGE: the device state, PING 3 and RUN. REFUSED: a reason and SHUT 1, which only a migfw sends. */
mtype = { START, END_OF_STREAM, PACKAGE, REST, RECV_BITMAP, RESUME,
          READY, PONG_3, BITMAP, RESUME_ACK, SHUT_0, SHUT_1, REFUSED };

/* Chosen once per run. `qemu`: the destination is one. */
bool postcopy, return_path, qemu;

bool source_lives = true, source_runs = true, destination_lives = true, destination_runs;
bool quiet;           /* no further faults, and no commands but the operator's */

/* What the source knows. */
bool handed_over;     /* the destination may be running the guest */
bool all_sent;        /* SHUT 0 may come */
bool confirmed;       /* SHUT 0 has come */
bool started_there;   /* PONG 3 or a bitmap has come */
bool peer_failed;     /* SHUT 1 has come */
bool refused;         /* ... and it proves that the guest does not run there */
bool closing;         /* the engine ends in postcopy */

/* What the destination knows. */
bool start_failed;    /* the guest cannot be started */
bool listening;       /* migrate-recover was given */
bool accepted;        /* a source has connected again */

/* The connection. A direction that is down loses what is sent, and perhaps what is under way. */
chan forward = [3] of { mtype };
chan back = [4] of { mtype };
bool forward_up = true, back_up = true;

#define SOURCE(old, new)       d_step { s == old -> s = new }
#define DESTINATION(old, new)  d_step { d == old -> d = new }
#define broken(channel, up)    (!up && empty(channel))

inline clear(channel) { do :: nempty(channel) -> channel?_ :: empty(channel) -> break od }
inline cut(channel, up) { atomic { up = false; if :: clear(channel) :: skip fi } }
inline hang_up() { atomic { cut(forward, forward_up); cut(back, back_up) } }
inline tell(channel, up, message) { atomic { if :: up -> channel!message :: !up fi } }

/* ---------------------------------------------------------------------------------------------------- the source */

/* A cancel, or an error that has nothing to do with the connection. */
#define stops  (s == CANCELLING || !quiet)

inline source_goes(old, new) { if :: SOURCE(old, new) :: s == CANCELLING -> goto fail fi }

inline note(message) {
	if
	:: message == PONG_3 || message == BITMAP -> started_there = true
	:: message == SHUT_0 -> confirmed = all_sent
	:: message == SHUT_1 -> peer_failed = true; refused = !started_there
	:: message == REFUSED -> peer_failed = true; refused = true
	:: else
	fi
}

/* Wait for this message. A fault or a cancel ends the wait. */
inline await(answer) {
	do
	:: atomic { back?heard ->
		note(heard);
		if
		:: heard == answer -> heard = 0; break
		:: else -> heard = 0; if :: peer_failed -> goto fail :: confirmed -> goto arrived :: else fi
		fi }
	:: broken(back, back_up) -> goto interrupted
	:: stops -> goto fail
	od
}

/* What the destination said last, as far as it arrives in time. */
inline last_words() { atomic { do :: back?heard -> note(heard); heard = 0 :: break od } }

/* Custody.hand_over_at_eof() and hand_over_at_run(): from here on a cancel comes too late. */
inline hand_over() {
	atomic {
		if
		:: s != CANCELLING -> handed_over = true
		:: stops -> goto fail
		:: broken(back, back_up) -> goto interrupted
		fi
	}
}

/* Custody.take_back(): start the guest again, unless the destination may be running it. */
inline take_back() {
	atomic { if :: !handed_over || refused -> source_runs = true :: else fi }
}

proctype Source() {
	mtype heard;
	{
again:		do
		:: s == SETUP ->
			tell(forward, forward_up, START);
			if :: return_path -> await(READY) :: !return_path fi;
			source_goes(SETUP, ACTIVE)
		:: s == ACTIVE ->
			source_runs = false;
			if	/* pre-switchover if the user has asked for it */
			:: source_goes(ACTIVE, PRE_SWITCHOVER)
			:: postcopy -> source_goes(ACTIVE, POSTCOPY_ACTIVE)
			:: !postcopy -> source_goes(ACTIVE, DEVICE)
			fi
		:: s == PRE_SWITCHOVER ->
			if
			:: postcopy -> source_goes(PRE_SWITCHOVER, POSTCOPY_ACTIVE)
			:: !postcopy -> source_goes(PRE_SWITCHOVER, DEVICE)
			fi
		:: s == DEVICE ->
			hand_over();
			all_sent = true;
			tell(forward, forward_up, END_OF_STREAM);
			if :: return_path -> await(SHUT_0) :: !return_path fi;
			goto arrived
		:: s == POSTCOPY_ACTIVE ->
			if
			:: !handed_over -> hand_over(); tell(forward, forward_up, PACKAGE)
			:: handed_over
			fi;
			atomic { all_sent = true; tell(forward, forward_up, REST) };
			await(SHUT_0);
			goto arrived
		:: s == POSTCOPY_PAUSED ->
			if
			:: listening || !quiet -> source_goes(POSTCOPY_PAUSED, POSTCOPY_RECOVER_SETUP)
			:: stops -> goto fail
			fi
		:: s == POSTCOPY_RECOVER_SETUP ->
			if
			:: atomic { listening && destination_lives ->
				clear(forward); clear(back);
				forward_up = true; back_up = true; listening = false; accepted = true };
				source_goes(POSTCOPY_RECOVER_SETUP, POSTCOPY_RECOVER)
			:: !listening || !destination_lives -> goto interrupted
			:: stops -> goto fail
			fi
		:: s == POSTCOPY_RECOVER ->
			tell(forward, forward_up, RECV_BITMAP);
			await(BITMAP);
			tell(forward, forward_up, RESUME);
			await(RESUME_ACK);
			source_goes(POSTCOPY_RECOVER, POSTCOPY_ACTIVE)
		:: s == CANCELLING -> goto fail
		od;

interrupted:	last_words();
		hang_up();
		if
		:: confirmed -> goto arrived
		:: !confirmed && (peer_failed || !handed_over || !postcopy) -> goto fail
		:: !confirmed && !peer_failed && handed_over && postcopy
		fi;
		if
		:: SOURCE(POSTCOPY_ACTIVE, POSTCOPY_PAUSED)
		:: SOURCE(POSTCOPY_RECOVER_SETUP, POSTCOPY_PAUSED)
		:: SOURCE(POSTCOPY_RECOVER, POSTCOPY_PAUSED)
		:: s == CANCELLING -> goto fail
		fi;
		goto again;

fail:		last_words();
		hang_up();
		if :: confirmed -> goto arrived :: !confirmed fi;
		if
		:: SOURCE(SETUP, FAILING)
		:: SOURCE(ACTIVE, FAILING)
		:: SOURCE(PRE_SWITCHOVER, FAILING)
		:: SOURCE(DEVICE, FAILING)
		:: SOURCE(POSTCOPY_ACTIVE, FAILING)
		:: SOURCE(POSTCOPY_PAUSED, FAILING)
		:: SOURCE(POSTCOPY_RECOVER_SETUP, FAILING)
		:: SOURCE(POSTCOPY_RECOVER, FAILING)
		:: s == CANCELLING
		fi;
		take_back();
		if
		:: SOURCE(FAILING, FAILED)
		:: SOURCE(CANCELLING, CANCELLED)
		fi;
		goto over;

arrived:	if
		:: SOURCE(DEVICE, COMPLETED)
		:: SOURCE(POSTCOPY_ACTIVE, COMPLETED)
		:: SOURCE(POSTCOPY_RECOVER, COMPLETED)
		:: SOURCE(CANCELLING, COMPLETED)
		fi;

over:		if :: closing -> atomic { source_lives = false; source_runs = false } :: !closing fi
	} unless { !source_lives }
}

/* ----------------------------------------------------------------------------------------------- the destination */

inline destination_pauses(old, new) { atomic { hang_up(); DESTINATION(old, new) } }

proctype Destination() {
	{
		do
		:: d == SETUP ->
			if
			:: atomic { forward?START -> tell(back, back_up, READY); DESTINATION(SETUP, ACTIVE) }
			:: broken(forward, forward_up) || !quiet -> goto fail
			fi
		:: d == ACTIVE ->
			if
			:: forward?END_OF_STREAM ->
				if
				:: destination_runs = true
				:: goto fail	/* it does not start, or was cancelled before */
				fi;
				DESTINATION(ACTIVE, COMPLETED);
				tell(back, back_up, SHUT_0);
				goto over
			:: forward?PACKAGE ->
				if :: tell(back, back_up, PONG_3) :: goto fail fi;	/* the device state may be wrong */
				if :: DESTINATION(ACTIVE, POSTCOPY_ACTIVE) :: !qemu -> goto fail fi	/* cancelled before RUN */
			:: broken(forward, forward_up) || !quiet -> goto fail
			fi
		:: d == POSTCOPY_ACTIVE ->
			if
			:: forward?REST ->
				if
				:: destination_runs ->
					DESTINATION(POSTCOPY_ACTIVE, COMPLETED);
					tell(back, back_up, SHUT_0);
					goto over
				:: start_failed -> goto fail
				fi
			:: atomic { broken(forward, forward_up) && qemu -> tell(back, back_up, SHUT_1) }; destination_pauses(POSTCOPY_ACTIVE, POSTCOPY_PAUSED)
			:: broken(forward, forward_up) -> destination_pauses(POSTCOPY_ACTIVE, POSTCOPY_PAUSED)
			:: start_failed -> goto fail
			fi
		:: d == POSTCOPY_PAUSED ->
			if
			:: atomic { accepted -> accepted = false; DESTINATION(POSTCOPY_PAUSED, POSTCOPY_RECOVER) }
			:: start_failed -> goto fail
			fi
		:: d == POSTCOPY_RECOVER ->
			if
			:: atomic { forward?RECV_BITMAP -> tell(back, back_up, BITMAP) }
			:: atomic { forward?RESUME ->
				tell(back, back_up, RESUME_ACK);
				DESTINATION(POSTCOPY_RECOVER, POSTCOPY_ACTIVE) }
			:: broken(forward, forward_up) -> destination_pauses(POSTCOPY_RECOVER, POSTCOPY_PAUSED)
			:: start_failed -> goto fail
			fi
		od;

fail:		if :: qemu -> tell(back, back_up, SHUT_1) :: !qemu -> tell(back, back_up, REFUSED) fi;
		if
		:: DESTINATION(SETUP, CANCELLED)
		:: DESTINATION(SETUP, FAILED)
		:: DESTINATION(ACTIVE, CANCELLED)
		:: DESTINATION(ACTIVE, FAILED)
		:: DESTINATION(POSTCOPY_ACTIVE, FAILED)
		:: DESTINATION(POSTCOPY_PAUSED, FAILED)
		:: DESTINATION(POSTCOPY_RECOVER, FAILED)
		fi;

over:		do	/* migrate-recover still works, to tell a source that missed it how this ended */
		:: atomic { accepted ->
			accepted = false;
			if
			:: d == COMPLETED -> tell(back, back_up, SHUT_0)
			:: d != COMPLETED -> tell(back, back_up, REFUSED)
			fi }
		od
	} unless { !destination_lives }
}

/* The guest is started in a thread of its own. A QEMU's start cannot fail. */
proctype GuestStart() {
	{
		d == POSTCOPY_ACTIVE || d == POSTCOPY_PAUSED || d == POSTCOPY_RECOVER ->
		if :: destination_runs = true :: atomic { !qemu -> start_failed = true } fi
	} unless { !destination_lives }
}

/* ------------------------------------------------------------------------------------------- faults and commands */

#define answers         (d == POSTCOPY_PAUSED || (!qemu && (d == COMPLETED || d == FAILED || d == CANCELLED)))
#define not_there       (!destination_lives || d == FAILED || d == CANCELLED)
#define asks            (handed_over && !refused && (s == FAILED || s == CANCELLED || (s == COMPLETED && !confirmed)))

/* What docs/decisions/switchover.md asks of whoever watches a migration. */
proctype Operator() {
	do
	:: atomic { s == POSTCOPY_PAUSED && answers && destination_lives && !listening && !accepted -> listening = true }
	:: atomic { not_there && !started_there && s == POSTCOPY_PAUSED -> SOURCE(POSTCOPY_PAUSED, CANCELLING) }
	:: atomic { not_there && asks && source_lives && !source_runs -> source_runs = true }
	od
}

/* Anyone, at any time. A cancel of the destination is in Destination, migrate-pause is a fault of the connection. */
proctype Commands() {
	do
	:: quiet -> break
	:: atomic { !quiet -> if
		:: SOURCE(SETUP, CANCELLING)
		:: SOURCE(ACTIVE, CANCELLING)
		:: SOURCE(PRE_SWITCHOVER, CANCELLING)
		:: SOURCE(DEVICE, CANCELLING)
		:: SOURCE(POSTCOPY_ACTIVE, CANCELLING); closing = true
		:: SOURCE(POSTCOPY_PAUSED, CANCELLING); closing = true
		:: SOURCE(POSTCOPY_RECOVER_SETUP, CANCELLING); closing = true
		:: SOURCE(POSTCOPY_RECOVER, CANCELLING); closing = true
		fi; break }
	od
}

proctype Faults() {
	do
	:: quiet = true; break
	:: atomic { forward_up -> cut(forward, forward_up) }
	:: atomic { back_up -> cut(back, back_up) }
	:: atomic { source_lives = false; source_runs = false; hang_up(); break }
	:: atomic { destination_lives = false; destination_runs = false; hang_up(); break }
	od
}

/* Spin's fairness needs a process that can always move. */
proctype Time() { quiet -> do :: true; true od }

init {
	atomic {
		if :: postcopy = true; return_path = true :: return_path = true :: skip fi;
		if :: qemu = true :: skip fi;
		run Source(); run Destination(); run GuestStart(); run Operator(); run Commands(); run Faults(); run Time()
	}
}

#define both_live  (source_lives && destination_lives && !closing)
#define ended      (s == COMPLETED || s == FAILED || s == CANCELLED)

ltl at_most_one { [] !(source_runs && destination_runs) }
ltl one_in_the_end { ([] both_live && <> quiet) -> <>[] ((source_runs || destination_runs) && (ended || qemu)) }
