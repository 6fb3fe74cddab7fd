"""The 60 bad inputs: which tests hold each of them. A row is the number of an input; the tests say what happens.

Every named test exists and every number has one: checked here, without running them.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

HELD = {
    # an empty folder, list or table
    1: ("tests/promises/test_bad_images.py::test_01_an_empty_folder_list_or_table",
        "tests/promises/test_bad_images.py::test_01_a_parquet_without_rows"),
    # folders or texts alone
    2: ("tests/promises/test_bad_images.py::test_02_folders_and_texts_alone",
        "tests/data/test_sources.py::test_folders_without_images_say_what_they_hold"),
    # no bytes
    3: ("tests/promises/test_bad_images.py::test_pictures_that_are_refused_stop_or_are_counted",
        "tests/data/test_images.py::test_empty_and_text_files_say_what_they_are"),
    # a page for an image
    4: ("tests/promises/test_bad_images.py::test_pictures_that_are_refused_stop_or_are_counted",
        "tests/data/test_images.py::test_empty_and_text_files_say_what_they_are"),
    # cut in half
    5: ("tests/promises/test_bad_images.py::test_pictures_that_are_refused_stop_or_are_counted",
        "tests/data/test_images.py::test_a_picture_cut_in_half_is_refused"),
    # without its end
    6: ("tests/promises/test_bad_images.py::test_pictures_that_are_accepted_are_stored_and_their_kind_counted",
        "tests/data/test_images.py::test_a_missing_end_is_minor_damage"),
    # a flipped byte in a JPEG's scan
    7: ("tests/promises/test_bad_images.py::test_pictures_that_are_accepted_are_stored_and_their_kind_counted",
        "tests/data/test_images.py::test_a_flipped_byte_in_a_jpeg_scan_is_accepted"),
    # a PNG with a wrong CRC
    8: ("tests/promises/test_bad_images.py::test_pictures_that_are_refused_stop_or_are_counted",
        "tests/data/test_images.py::test_a_png_with_a_wrong_checksum_is_refused"),
    # a PNG of 100 megapixels
    9: ("tests/promises/test_bad_images.py::test_pictures_that_are_refused_stop_or_are_counted",
        "tests/data/test_images.py::test_bombs_are_refused_before_decoding"),
    # 400 megapixels, a strip
    10: ("tests/promises/test_bad_images.py::test_pictures_that_are_refused_stop_or_are_counted",
         "tests/data/test_images.py::test_bombs_are_refused_before_decoding"),
    # a text bomb
    11: ("tests/promises/test_bad_images.py::test_pictures_that_are_refused_stop_or_are_counted",
         "tests/data/test_images.py::test_a_text_bomb_in_a_png_is_one_bad_image"),
    # CMYK
    12: ("tests/promises/test_bad_images.py::test_pictures_that_are_accepted_are_stored_and_their_kind_counted",
         "tests/data/test_images.py::test_cmyk_is_converted_and_counted"),
    # grey of 16 bits
    13: ("tests/promises/test_bad_images.py::test_pictures_that_are_accepted_are_stored_and_their_kind_counted",
         "tests/data/test_images.py::test_sixteen_bit_grey_is_scaled_not_clipped"),
    # TIFF of 32 bits
    14: ("tests/promises/test_bad_images.py::test_pictures_that_are_refused_stop_or_are_counted",
         "tests/data/test_images.py::test_thirty_two_bit_pictures_are_refused"),
    # TIFF with NaN
    15: ("tests/promises/test_bad_images.py::test_pictures_that_are_refused_stop_or_are_counted",
         "tests/data/test_images.py::test_thirty_two_bit_pictures_are_refused"),
    # transparent
    16: ("tests/promises/test_bad_images.py::test_pictures_that_are_accepted_are_stored_and_their_kind_counted",
         "tests/promises/test_bad_images.py::test_16_17_what_is_done_to_pictures_belongs_to_the_store",
         "tests/data/test_images.py::test_transparency_goes_over_the_background"),
    # EXIF orientation
    17: ("tests/promises/test_bad_images.py::test_pictures_that_are_accepted_are_stored_and_their_kind_counted",
         "tests/promises/test_bad_images.py::test_16_17_what_is_done_to_pictures_belongs_to_the_store",
         "tests/data/test_images.py::test_exif_orientation_is_applied_once"),
    # animated, of several pages
    18: ("tests/promises/test_bad_images.py::test_pictures_that_are_accepted_are_stored_and_their_kind_counted",
         "tests/promises/test_bad_images.py::test_18_animations_can_be_left_out",
         "tests/data/test_images.py::test_of_an_animation_the_first_frame_counts"),
    # EPS, PDF, SVG, ICO, PSD
    19: ("tests/promises/test_bad_images.py::test_pictures_that_are_refused_stop_or_are_counted",
         "tests/data/test_images.py::test_formats_outside_the_list_are_refused"),
    # another ending than its content
    20: ("tests/promises/test_bad_images.py::test_pictures_that_are_accepted_are_stored_and_their_kind_counted",
         "tests/data/test_images.py::test_the_content_decides_not_the_name"),
    # ICC profiles
    21: ("tests/promises/test_bad_images.py::test_pictures_that_are_accepted_are_stored_and_their_kind_counted",
         "tests/data/test_images.py::test_garbage_profiles_are_ignored_and_counted",
         "tests/data/test_images.py::test_a_profile_is_converted_to_srgb"),
    # too small, too long
    22: ("tests/promises/test_bad_images.py::test_pictures_that_are_refused_stop_or_are_counted",
         "tests/data/test_images.py::test_small_and_long_pictures_are_refused"),
    # the same bytes twice
    23: ("tests/promises/test_bad_images.py::test_23_the_same_bytes_twice_are_two_rows",),
    # the same key twice
    24: ("tests/promises/test_bad_texts.py::test_24_two_pictures_of_one_key",
         "tests/promises/test_bad_texts.py::test_24_a_member_twice_in_an_archive"),
    # a caption missing
    25: ("tests/promises/test_bad_texts.py::test_25_a_caption_that_is_missing",),
    # a caption of nothing, BOM, CRLF
    26: ("tests/promises/test_bad_texts.py::test_26_a_caption_of_nothing_is_missing",
         "tests/promises/test_bad_texts.py::test_26_27_28_captions_are_kept_as_they_are"),
    # a caption that is no UTF-8
    27: ("tests/promises/test_bad_texts.py::test_27_28_captions_that_are_no_text",
         "tests/promises/test_bad_texts.py::test_26_27_28_captions_are_kept_as_they_are"),
    # emoji, right to left, NUL, a megabyte
    28: ("tests/promises/test_bad_texts.py::test_26_27_28_captions_are_kept_as_they_are",
         "tests/promises/test_bad_texts.py::test_27_28_captions_that_are_no_text",
         "tests/extraction/test_extract.py::test_a_caption_of_300_words_is_kept_whole"),
    # names of files
    29: ("tests/promises/test_bad_texts.py::test_29_odd_names_are_escaped_keys",
         "tests/promises/test_bad_texts.py::test_29_two_spellings_of_one_name"),
    # files of prompts
    30: ("tests/promises/test_bad_texts.py::test_30_a_prompt_file_of_nothing",
         "tests/promises/test_bad_texts.py::test_30_blank_lines_repeats_and_number_signs",
         "tests/promises/test_bad_texts.py::test_30_a_million_lines_are_planned"),
    # prompts as paths
    31: ("tests/promises/test_bad_texts.py::test_31_a_prompt_is_no_file_name",),
    # a broken line, a missing column
    32: ("tests/promises/test_bad_texts.py::test_32_a_line_that_is_no_json",
         "tests/promises/test_bad_texts.py::test_32_a_column_that_is_not_there",
         "tests/data/test_parquet.py::test_columns_that_are_not_there_or_of_another_kind"),
    # paths out of the folder
    33: ("tests/promises/test_bad_texts.py::test_33_a_path_out_of_the_folder",
         "tests/data/test_sources.py::test_metadata_does_not_leave_its_folder"),
    # links, devices, pipes
    34: ("tests/promises/test_bad_texts.py::test_34_links_devices_and_pipes_are_never_opened",
         "tests/data/test_sources.py::test_links_devices_and_pipes"),
    # an output that is a link, or in the input
    35: ("tests/promises/test_bad_texts.py::test_35_an_output_that_is_a_link_or_lies_in_the_input",),
    # a tar that is cut
    36: ("tests/promises/test_bad_archives.py::test_36_a_shard_that_is_cut_at_any_border",
         "tests/promises/test_bad_archives.py::test_36_good_work_is_kept_when_a_shard_breaks_later",
         "tests/extraction/test_extract.py::test_an_archive_that_is_damaged_while_it_is_read_loses_nothing",
         "tests/data/test_webdataset.py::test_a_cut_anywhere_is_an_error_with_its_byte",),
    # names that leave it, links, pipes
    37: ("tests/promises/test_bad_archives.py::test_37_hostile_members_are_refused_and_counted",
         "tests/promises/test_no_code_from_data.py::test_members_of_a_tar",
         "tests/data/test_webdataset.py::test_hostile_members_stop_or_are_left_out",),
    # pickles in a tar, pipe: for a shard
    38: ("tests/promises/test_bad_archives.py::test_38_members_that_hold_code_are_counted_and_a_pipe_is_no_shard",
         "tests/promises/test_no_code_from_data.py::test_sources_that_others_would_run",
         "tests/data/test_webdataset.py::test_samples_and_their_texts",
         "tests/data/test_sources.py::test_addresses_that_cannot_be_opened"),
    # a tar.gz that unpacks to 50 GB
    39: ("tests/promises/test_bad_archives.py::test_39_a_compressed_archive_is_not_unpacked",
         "tests/promises/test_bombs.py::test_a_bomb_is_refused_soon_and_in_a_gigabyte",
         "tests/data/test_webdataset.py::test_compressed_and_empty_archives_say_so",),
    # chmod 000
    40: ("tests/promises/test_bad_archives.py::test_40_what_we_may_not_read_is_named_with_its_mode",
         "tests/promises/test_bad_archives.py::test_40_a_folder_we_may_not_enter_or_list_stops",
         "tests/promises/test_bad_archives.py::test_40_a_file_that_is_the_whole_input",
         "tests/data/test_images.py::test_a_file_we_may_not_read_names_its_mode",),
    # removed or changed meanwhile
    41: ("tests/extraction/test_extract.py::test_an_image_that_changes_during_the_run_is_no_row",
         "tests/data/test_sources.py::test_an_image_that_changes_after_the_scan_is_not_loaded",
         "tests/data/test_webdataset.py::test_an_archive_that_changes_after_the_scan_is_not_loaded",
         "tests/data/test_parquet.py::test_a_table_that_changes_after_the_scan_is_not_loaded"),
    # disk full
    42: ("tests/extraction/test_extract.py::test_a_full_disk_stops_with_3_and_freeing_it_continues",
         "tests/extraction/test_extract.py::test_a_disk_too_small_from_the_start_is_refused_before_encoding",
         "tests/training/test_training_checkpoint.py::test_a_full_disk_keeps_the_old_checkpoint_and_leaves_no_half_one",
         "tests/artifacts/test_files.py::test_a_full_disk_is_told_and_keeps_the_old_file",
         "tests/promises/test_faults.py::test_an_error_at_any_call_is_told_and_loses_nothing"),
    # quota, read-only, EIO on fsync
    43: ("tests/promises/test_faults.py::test_an_error_at_any_call_is_told_and_loses_nothing",
         "tests/promises/test_canaries.py::test_a_failed_fsync_taken_for_done",
         "tests/artifacts/test_files.py::test_a_limit_on_file_sizes_is_a_full_disk",
         "tests/artifacts/test_files.py::test_a_folder_that_cannot_be_written",
         "tests/extraction/test_extract.py::test_a_limit_on_file_size_stops_with_3"),
    # kill -9 in extract
    44: ("tests/promises/test_kills.py::test_two_kills_and_the_same_bytes",
         "tests/promises/test_faults.py::test_a_power_cut_after_any_change_loses_nothing",
         "tests/promises/test_canaries.py::test_an_index_before_its_shard",
         "tests/extraction/test_extract.py::test_a_crash_inside_the_encoder_keeps_finished_shards"),
    # kill or signals in a save
    45: ("tests/promises/test_kills.py::test_a_signal_inside_a_save_lets_it_finish_and_stops_with_75",
         "tests/promises/test_kills.py::test_two_signals_stop_at_once_and_lose_nothing",
         "tests/training/test_training_resume.py::test_kills_in_the_save_and_at_random_moments",
         "tests/training/test_training_resume.py::test_a_second_signal_stops_at_once_with_130"),
    # SLURM kills before a save is done
    46: ("tests/training/test_training_loop.py::test_a_checkpoint_that_takes_longer_than_a_killer_waits_is_told_once",
         "tests/training/test_training_checkpoint.py::test_leftovers_of_a_killed_save_are_swept",
         "tests/training/test_training_resume.py::test_kills_in_the_save_and_at_random_moments",
         "tests/runtime/test_launch.py::test_a_slurm_job_is_queued_again_only_when_it_stopped_on_request"),
    # two extractions
    47: ("tests/promises/test_bad_stores.py::test_47_a_second_extraction_is_told_at_once_who_writes",
         "tests/extraction/test_extract.py::test_a_second_extraction_into_the_same_store_names_the_first",
         "tests/promises/test_faults.py::test_a_second_writer_is_refused_and_harms_nothing",
         "tests/data/test_store.py::test_a_second_writer_is_refused_with_the_owner"),
    # a missing shard or chunk
    48: ("tests/promises/test_bad_stores.py::test_a_damaged_store_stops_a_training_at_its_start",
         "tests/data/test_store.py::test_missing_and_truncated_files",
         "tests/data/test_store.py::test_a_missing_inner_chunk_is_no_row_of_zeros",
         "tests/data/test_store.py::test_a_missing_chunk_of_codes_or_scales_is_no_row"),
    # a flipped bit, a cut shard, an absurd shape
    49: ("tests/promises/test_bad_stores.py::test_a_damaged_store_stops_a_training_at_its_start",
         "tests/promises/test_bad_stores.py::test_49_a_flipped_bit_is_told_with_its_shard_and_rows",
         "tests/data/test_store.py::test_a_flipped_bit_anywhere_is_found",
         "tests/data/test_store.py::test_without_sha256_the_inner_checksums_still_find_it",
         "tests/data/test_store.py::test_missing_and_truncated_files",
         "tests/data/test_store.py::test_an_absurd_shape_is_refused_at_once",
         "tests/promises/test_flips.py::test_a_store"),
    # .partial, .DS_Store, others' arrays
    50: ("tests/promises/test_bad_stores.py::test_50_foreign_files_are_listed_and_left_alone",
         "tests/promises/test_bad_stores.py::test_50_temporary_files_of_a_killed_extraction_are_swept",
         "tests/data/test_store.py::test_foreign_files_are_listed_and_ignored",
         "tests/data/test_store.py::test_a_damaged_draft_is_mended",
         "tests/data/test_store.py::test_hidden_files_of_others_in_a_draft_are_no_part_of_the_store",
         "tests/extraction/test_extract.py::test_foreign_files_in_the_output_are_left_alone"),
    # another encoder
    51: ("tests/promises/test_bad_stores.py::test_51_52_latents_of_another_encoder_or_of_other_weights",
         "tests/generation/test_generate.py::test_parts_that_do_not_fit_are_named_before_loading",
         "tests/training/test_train_branch.py::test_latents_of_another_encoder_are_refused_before_any_loading",
         "tests/training/test_train_controlnet.py::test_vae_latents_of_another_flux_are_refused",
         "tests/training/test_train_controlnet.py::test_vae_latents_of_another_grid_are_refused"),
    # its name, other weights
    52: ("tests/promises/test_bad_stores.py::test_51_52_latents_of_another_encoder_or_of_other_weights",
         "tests/training/test_train_branch.py::test_the_same_encoder_with_other_weights_is_refused",),
    # a checkpoint tampered with
    53: ("tests/promises/test_bad_checkpoints.py::test_53_a_branch_that_was_tampered_with",
         "tests/promises/test_bad_checkpoints.py::test_53_a_flipped_bit_is_seen_by_the_hash",
         "tests/training/test_training_checkpoint.py::test_a_flipped_byte_anywhere_is_an_error",
         "tests/training/test_training_checkpoint.py::test_tied_weights_are_stored_once_and_other_models_refused",
         "tests/promises/test_flips.py::test_a_checkpoint",
         "tests/data/test_safetensors_io.py::test_a_bad_number_names_its_tensor"),
    # safetensors headers that are bombs
    54: ("tests/promises/test_bombs.py::test_a_bomb_is_refused_soon_and_in_a_gigabyte",
         "tests/data/test_safetensors_io.py::test_malformed_files_are_refused_at_once",),
    # pickles, renamed ones too
    55: ("tests/promises/test_no_code_from_data.py::test_a_pickle_for_weights",
         "tests/promises/test_no_code_from_data.py::test_a_model_of_pickles_alone",
         "tests/data/test_safetensors_io.py::test_a_pickle_is_refused_and_never_run",),
    # other formats
    56: ("tests/promises/test_bad_checkpoints.py::test_56_an_artifact_of_another_format",
         "tests/promises/test_bad_checkpoints.py::test_56_a_recipe_of_another_format",
         "tests/artifacts/test_artifacts.py::test_a_newer_format_asks_for_an_update",
         "tests/config/test_config.py::test_refused_with_place_and_reason_within_a_second",
         "tests/config/test_config.py::test_an_old_key_is_read_and_a_new_recipe_says_what_it_is_called"),
    # NaN, lr 1e9
    57: ("tests/promises/test_bad_checkpoints.py::test_57_a_learning_rate_of_1e9_writes_no_checkpoint",
         "tests/training/test_training_loop.py::test_a_bad_row_stops_before_the_step_and_keeps_the_last_checkpoint",
         "tests/training/test_training_loop.py::test_weights_that_overflow_are_never_saved",
         "tests/extraction/test_extract.py::test_an_encoder_that_gives_nan_is_refused"),
    # offline, 503, half a download
    58: ("tests/loading/test_hub.py::test_each_trouble_has_its_own_message_and_a_fix",
         "tests/loading/test_hub.py::test_half_a_download_is_never_taken_for_a_model",
         "tests/loading/test_hub.py::test_offline_opens_no_socket"),
    # gated, remote code, only .bin
    59: ("tests/promises/test_no_code_from_data.py::test_code_beside_a_model",
         "tests/promises/test_no_code_from_data.py::test_a_family_of_its_own",
         "tests/promises/test_no_code_from_data.py::test_a_model_of_pickles_alone",
         "tests/loading/test_hub.py::test_each_trouble_has_its_own_message_and_a_fix",
         "tests/loading/test_hub.py::test_no_two_troubles_read_the_same"),
    # what YAML can hide; clock, locale
    60: ("tests/promises/test_bad_recipes.py::test_60_a_bad_recipe_has_file_line_and_column_within_a_second",
         "tests/promises/test_bad_recipes.py::test_60_1e_4_is_a_number",
         "tests/promises/test_bad_recipes.py::test_60_clock_hash_seed_and_locale_change_no_byte",
         "tests/config/test_config.py::test_refused_with_place_and_reason_within_a_second",
         "tests/config/test_config.py::test_numbers_and_words_mean_what_they_look_like",
         "tests/config/test_config.py::test_hash_seed_and_locale_do_not_matter",
         "tests/training/test_train_branch.py::test_a_batch_larger_than_the_store_is_refused"),
}  # fmt: skip


def test_every_number_is_held():
    assert sorted(HELD) == list(range(1, 61)) and all(HELD.values())


@pytest.mark.parametrize("number", HELD)
def test_its_tests_exist(number):
    missing = [name for name in HELD[number] if name.partition("::")[2] not in names_in(name.partition("::")[0])]
    assert not missing


def names_in(file: str) -> set[str]:
    tree = ast.parse((ROOT / file).read_text()) if (ROOT / file).exists() else ast.Module([], [])
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}
