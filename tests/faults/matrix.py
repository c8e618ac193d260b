"""The fault matrix: which tests hold what is promised when something breaks.

A test that is named here carries the marker ``faults``, wherever it lives. The table of
docs/checkpoints.md names the same tests.
"""

from __future__ import annotations

MATRIX: dict[str, tuple[str, ...]] = {
    "F1": (
        "tests/faults/test_death.py::test_a_killed_rank_is_named",
        "tests/faults/test_death.py::test_a_training_whose_rank_is_killed_in_the_third_chunk_ends_and_names_it",
        "tests/faults/test_soak.py::test_random_kills_change_no_weight",  # ... bitwise afterwards
    ),
    "F2": (
        "tests/faults/test_hang.py::test_a_rank_that_gives_no_sign_of_life_is_named",
        "tests/faults/test_hang.py::test_a_rank_that_lives_and_does_not_come_is_named_with_what_it_does",
        "tests/faults/test_hang.py::test_a_training_with_a_stopped_rank_ends_and_names_it",
        "tests/unit/distributed/test_notices.py::test_a_rank_that_others_wait_for_is_named",
        "tests/unit/distributed/test_notices.py::test_a_silent_rank_is_named",
    ),
    "F3": ("tests/faults/test_saving.py::test_f3_killed_while_saving",),
    "F4": (
        "tests/faults/test_stopping.py::test_a_stopped_run_goes_on_bitwise",
        "tests/faults/test_launchers.py::test_a_signalled_run_stops_and_goes_on_bitwise",
        "tests/faults/test_launchers.py::test_the_restart_loop_stops_when_asked_and_starts_again_when_not",
    ),
    "F5": (
        "tests/faults/test_stopping.py::test_a_stopped_run_goes_on_bitwise",
        "tests/faults/test_stopping.py::test_saving_in_the_background_too",
    ),
    "F6": ("tests/faults/test_saving.py::test_f6_truncated",),
    "F7": (
        "tests/faults/test_saving.py::test_f7_flipped_byte",
        "tests/faults/test_saving.py::test_any_byte_of_the_manifest_counts",
    ),
    "F8": ("tests/faults/test_saving.py::test_f8_missing_mixed_and_extra",),
    "F9": (
        "tests/faults/test_saving.py::test_f9_latest",
        "tests/faults/test_saving.py::test_nothing_whole_is_an_error_and_no_fresh_start",
    ),
    "F10": (
        "tests/faults/test_saving.py::test_f10_disk_full",
        "tests/faults/test_saving.py::test_a_file_that_one_rank_cannot_write_fails_all",
        "tests/faults/test_saver.py::test_an_error_in_the_background_is_everybodys_at_the_next_save",
        "tests/faults/test_save_errors.py::test_a_full_disk_costs_checkpoints_and_not_the_run",
        "tests/faults/test_save_errors.py::test_the_last_step_must_be_saved",
        "tests/faults/test_run_lock.py::test_a_full_disk_is_refused",
    ),
    "F11": (
        "tests/faults/test_run_lock.py::test_a_read_only_folder_is_refused",
        "tests/faults/test_run_lock.py::test_a_file_in_the_way_is_named",
        "tests/distributed/test_bad_input.py::test_output_dir_that_is_a_file",
    ),
    "F12": (
        "tests/faults/test_run_lock.py::test_a_second_run_is_refused_and_a_dead_one_makes_room",
        "tests/faults/test_run_lock.py::test_a_run_is_refused_on_every_rank_and_gives_the_folder_back",
    ),
    "F13": ("tests/faults/test_exact_resume.py::test_a_resumed_run_is_the_uninterrupted_run",),
    "F14": (
        "tests/faults/test_elastic_resume.py::test_a_run_goes_on_anywhere",
        "tests/distributed/test_restore.py::test_numbers_of_ranks",
    ),
    "F15": ("tests/distributed/test_restore.py::test_stages",),
    "F16": ("tests/faults/test_resume_policy.py::test_other_data_is_refused",),
    "F17": (
        "tests/faults/test_resume_policy.py::test_harmless_changes_are_shown_and_change_nothing",
        "tests/faults/test_resume_policy.py::test_dangerous_changes_are_refused_before_a_model_is_built",
        "tests/faults/test_resume_policy.py::test_other_parameters_are_refused_even_if_they_are_named",
        "tests/faults/test_resume_policy.py::test_frozen_weights_that_changed_under_their_name",
    ),
    # Training uses whole global batches only, so that no rank is ever short of rows.
    "F18": (
        "tests/unit/data/test_sampler.py::test_global_batches_of_an_epoch_do_not_overlap_and_drop_the_rest",
        "tests/unit/data/test_sampler.py::test_shards_are_equal_and_lose_nothing",
        "tests/distributed/test_bad_input.py::test_fewer_records_than_one_global_batch",
    ),
    "F19": (
        "tests/parity/test_losses.py::test_loss_in_the_step",
        "tests/parity/test_step_matrix.py::test_plain",
    ),
    "F20": (
        "tests/unit/data/test_readers.py::test_broken_json_line_is_named",
        "tests/unit/data/test_readers.py::test_damaged_files_are_refused_by_line",
        "tests/unit/data/test_readers.py::test_mixed_types_in_a_column_are_refused_by_record",
        "tests/unit/data/test_readers.py::test_a_byte_order_mark_is_no_part_of_the_data",
        "tests/unit/data/test_readers.py::test_long_lines_take_bounded_memory",
        "tests/distributed/test_bad_input.py::test_a_blank_text_in_one_ranks_share",
    ),
    "F21": (
        "tests/unit/data/test_images.py::test_missing_file_names_record_path_and_remedy",
        "tests/unit/data/test_images.py::test_half_a_file_is_an_error",
        "tests/unit/data/test_images.py::test_empty_file_and_empty_bytes",
        "tests/unit/data/test_images.py::test_text_file_is_not_an_image",
        "tests/distributed/test_bad_input.py::test_an_image_missing_in_one_ranks_share",
        "tests/distributed/test_bad_input.py::test_an_unreadable_image_ends_every_rank",
        "tests/distributed/test_modes.py::test_bad_records_are_skipped_and_listed",
    ),
    "F22": (
        "tests/unit/data/test_images.py::test_bombs_are_refused_in_bounded_memory",
        "tests/unit/data/test_images.py::test_the_largest_image_takes_bounded_memory",
        "tests/unit/data/test_images.py::test_animation_gives_its_first_frame",
        "tests/unit/data/test_images.py::test_cmyk_is_converted",
        "tests/unit/data/test_images.py::test_16_bit_grey_is_scaled_not_clipped",
    ),
    "F23": (
        "tests/unit/data/test_image_paths.py::test_paths_that_leave_it",
        "tests/unit/data/test_image_paths.py::test_urls_are_refused_by_name_wherever",
        "tests/unit/data/test_images.py::test_a_url_is_never_fetched",
    ),
    "F24": (
        "tests/faults/test_pickle_bombs.py::test_of_a_checkpoint",
        "tests/faults/test_pickle_bombs.py::test_of_a_head",
        "tests/faults/test_pickle_bombs.py::test_of_a_teacher_and_a_model",
        "tests/unit/models/test_module_state.py::test_a_state_runs_no_code",
    ),
    "F25": (
        "tests/faults/test_nonfinite.py::test_a_skipped_step_leaves_no_trace",
        "tests/faults/test_nonfinite.py::test_the_run_ends_and_says_where",
        "tests/faults/test_nonfinite.py::test_too_many_in_a_row_end_the_run",
        "tests/faults/test_nonfinite.py::test_an_embedding_of_zeros_is_a_step_like_any_other",
        "tests/faults/test_nonfinite.py::test_the_report_has_what_is_needed_to_find_the_record",
    ),
    "F26": (
        "tests/unit/training/test_spikes.py::test_a_spike_is_described_once",
        "tests/faults/test_nonfinite.py::test_a_whole_run_skips_logs_and_warns",
        "tests/parity/test_step_matrix.py::test_dropout_and_clipping",
    ),
    "F27": (
        "tests/unit/config/test_loading.py::test_unknown_keys_name_the_nearest",
        "tests/unit/config/test_loading.py::test_wrong_values_name_key_value_origin_and_rule",
        "tests/distributed/test_bad_input.py::test_missing_config_file",
    ),
    "F28": (
        "tests/unit/engine/test_ds_config.py::test_each_problem_by_its_message",
        "tests/unit/engine/test_ds_config.py::test_all_problems_come_together",
        "tests/distributed/test_bad_input.py::test_batch_triple_that_does_not_divide",
    ),
    "F29": (
        "tests/unit/engine/test_ds_config.py::test_features_that_are_not_proven_are_refused_by_name",
        "tests/distributed/test_bad_input.py::test_unsupported_deepspeed_feature",
    ),
    "F30": (
        "tests/faults/test_stale_lock.py::test_alone_it_is_removed_and_named",
        "tests/faults/test_stale_lock.py::test_beside_another_job_it_is_named_while_it_is_waited_for",
    ),
    "F31": (
        "tests/unit/tracking/test_trackers.py::test_a_tracker_that_fails_warns_once",
        "tests/unit/tracking/test_trackers.py::test_wandb_that_cannot_start",
        "tests/unit/tracking/test_trackers.py::test_wandb_that_is_not_installed",
        "tests/unit/tracking/test_trackers.py::test_a_line_is_on_disk_as_soon_as_it_is_logged",
        "tests/faults/test_trackers.py::test_offline_wandb_keeps_a_run_of_its_own",
        "tests/faults/test_trackers.py::test_wandb_that_reaches_no_server_ends_the_run_before_it_begins",
    ),
    "F32": (
        "tests/faults/test_dead_worker.py::test_a_killed_loader_process_ends_a_training",
        "tests/unit/data/test_workers.py::test_a_killed_worker_is_named_at_once",
        "tests/unit/data/test_workers.py::test_a_stuck_worker_is_given_up_and_ended",
    ),
    "F33": (
        "tests/faults/test_replicas.py::test_one_bit_of_a_weight",
        "tests/faults/test_replicas.py::test_a_forgotten_synchronisation_shows_behind_the_first_step",
        "tests/faults/test_replicas.py::test_what_has_diverged_is_not_saved",
    ),
    "F34": ("tests/parity/test_self_test.py::test_a_wrong_gradient_stops_the_run_on_every_rank",),
    "F35": (
        "tests/unit/checkpointing/test_conversion.py::test_stopped_by_a_signal",
        "tests/unit/checkpointing/test_conversion.py::test_what_a_killed_conversion_left_goes",
        "tests/unit/checkpointing/test_conversion.py::test_a_disk_that_is_really_full",
        "tests/unit/checkpointing/test_conversion.py::test_the_folder_is_that_of_transformers",
        "tests/unit/checkpointing/test_export.py::test_filled_target_is_left_alone",
        "tests/distributed/test_export.py::test_embeddings",
    ),
    "F36": (
        "tests/faults/test_rendezvous.py::test_a_taken_port_is_named_with_the_remedy",
        "tests/faults/test_rendezvous.py::test_ranks_that_never_come_are_named",
        "tests/faults/test_rendezvous.py::test_a_rank_0_that_never_comes_is_named",
    ),
    "F37": ("tests/faults/test_soak.py::test_random_kills_change_no_weight",),
}
