"""The journal of checkpoints: whole after a kill, and indulgent towards foreign lines."""

from training.run.checkpoint_notes import (
    CHECKPOINTS_FILE,
    FAILED,
    SAVED,
    CheckpointNote,
    append_note,
    read_notes,
)


def test_notes_survive_a_line_that_was_cut_off(tmp_path):
    assert read_notes(tmp_path) == []
    first, second = CheckpointNote(5, SAVED), CheckpointNote(10, FAILED, "no räum left")
    append_note(tmp_path, first)
    with (tmp_path / CHECKPOINTS_FILE).open("a") as file:
        file.write('{"step": 7, "outc')

    assert read_notes(tmp_path) == [first]
    append_note(tmp_path, second)
    assert read_notes(tmp_path) == [first, second]


def test_lines_of_another_version_are_left_out(tmp_path):
    (tmp_path / CHECKPOINTS_FILE).write_text('{"colour": 3}\n[]\nnonsense\n')
    note = CheckpointNote(4, SAVED)

    append_note(tmp_path, note)

    assert read_notes(tmp_path) == [note]
