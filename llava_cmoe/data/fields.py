"""Which fields of a raw row may stand there unread: one that carries content is refused by name, never dropped.

LLaVA's readers look at `id`, `image` and `conversations` and drop the rest, so a row with a `video` is learned as text
alone. Here a field that no reader looks at is

- a note, if it is known to be one (`question_type`, `bbox`, `metadata`, `model_id`, ...: published CoIN, LLaVA and UCIT
  files hold such fields and load as they are), or if it holds nothing, numbers or truth values alone;
- refused, if it is known to be content (`video`, `system_prompt`, `tools`, ...), with what to do about it;
- refused, if nobody knows it and it holds text, lists of texts or objects: moved into `metadata` it is a note.

`data check` lists the notes of every file. What the fields that are read have to look like is `coin_rows.py`'s.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from llava_cmoe.data.problems import Unusable
from llava_cmoe.data.spelling import as_named

READ = frozenset(
    "id question_id image images conversations text answer answers answer_bbox size choices".split()  # of either kind
)
READ_OF_TURN = frozenset({"from", "value"})

NOTES = frozenset(
    """
    metadata meta info extra_info comment comments note notes source sources data_source dataset dataset_name origin
    split subset task task_name category categories super_category type kind tags tag topic subject subtopic domain
    field skill skills grade level difficulty language lang context_type version license licence author annotator
    question_type answer_type question_number index idx rank order turn_index
    bbox bboxes box boxes segmentation mask area width height image_size original_size answer_bbox_original iscrowd
    model model_id model_name answer_id shortuuid choice_id template template_id prompt_type instruction_type
    class class_name label label_name wnid synset object objects_names ref_id ann_id sent_id sentence_id pid qid uid
    uuid url coco_url flickr_url homepage date date_captured created created_at updated_at timestamp time
    confidence confidences answer_confidence answer_confidences answerable score scores weight_class
    explanation explanations rationale rationales reason solution lecture hint options original_answer original_question
    question raw_question full_answer fullAnswer short_answer direct_answers ground_truth gt correct_answer
    correct_choice semantic semanticStr entailed equivalent groups types isBalanced annotations program
    markdown length token_count tokens num_tokens md5 sha256 hash
    """.split()
)
"""Names under which published files keep what is about a row. A `question`, `options` or `hint` repeats what stands in
the row's text, as CoIN's, ScienceQA's and VQA's files have it; what is answered is the text."""

ENDINGS = ("_id", "_ids", "_type", "_idx", "_index", "_version", "_split", "_source", "_license")

PICTURE_NAMES = frozenset(
    "image_path image_name image_file image_filename image_url img img_path img_name file_name filename picture".split()
)
"""Notes beside an `image`; the row's picture where there is none."""

MEDIA = "only one picture a row is read; take such rows out, or give one frame of them as `image`"
SYSTEM = "no system prompt is learned; put it before the question, into the first turn or `text`"
TOOLS = "calls of tools are not learned; take such rows out, or write the calls into the turns"
TURNS = "turns are read from `conversations`, questions from `text`; bring the row into that form"
PICTURE = "the row's picture is read from `image`; rename the field"
WEIGHT = "all answers are learned alike; take out the turns that are not to be learned, and the field"

CONTENT: Mapping[str, str] = {
    **dict.fromkeys(
        """
        video videos video_path video_paths video_file audio audios audio_path speech sound clip clips frame frames
        image1 image2 image3 image_1 image_2 image_a image_b images_path image_list image_paths image_files pictures
        second_image reference_image target_image source_image depth depth_map point_cloud pointcloud mesh pdf
        """.split(),
        MEDIA,
    ),
    **dict.fromkeys("system system_prompt system_message sys instruction instructions persona".split(), SYSTEM),
    **dict.fromkeys("tools tool functions function function_call tool_calls".split(), TOOLS),
    **dict.fromkeys(
        "messages conversation dialog dialogue history prompt prefix suffix query input output response chosen "
        "rejected context passage".split(),
        TURNS,
    ),
    **dict.fromkeys("loss loss_mask loss_weight trainable weight".split(), WEIGHT),
}
"""Names of what a model is to see, hear or say, and what to do about each."""

MOST_NAMED = 5
"""Fields that a message names."""

UNKNOWN = "what it holds would be left out; delete it, or move it into `metadata`, which is not read"


def unread_fields(raw: Mapping[str, Any]) -> tuple[str, ...]:
    """The fields of a row, and of its turns, that nobody reads and that may stay.

    Raises:
        Unusable: a field that carries content, or may; names all of them and what to do about the first.
    """
    refused = [(f"`{as_named(key)}`", fix) for key in raw if (fix := _why_refused(key, raw, READ))]
    for number, turn in _turns(raw):
        refused += [
            (f"`{as_named(key)}` of turn {number}", fix)
            for key in turn
            if (fix := _why_refused(key, turn, READ_OF_TURN))
        ]
    if refused:
        names = ", ".join(name for name, _ in refused[:MOST_NAMED])
        names += f" and {len(refused) - MOST_NAMED} more" if len(refused) > MOST_NAMED else ""
        raise Unusable(f"{'field' if len(refused) == 1 else 'fields'} {names}: {refused[0][1]}")
    return tuple(key for key in raw if key not in READ)


def _turns(raw: Mapping[str, Any]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    conversations = raw.get("conversations")
    for number, turn in enumerate(conversations if isinstance(conversations, list) else ()):
        if isinstance(turn, dict):
            yield number, turn


def _why_refused(key: str, fields: Mapping[str, Any], read: frozenset[str]) -> str | None:
    value = fields[key]
    if key in read or value in (None, "", [], {}):
        return None
    if key in CONTENT:
        return CONTENT[key]
    if key in PICTURE_NAMES:
        return None if fields.get("image") or fields.get("images") else PICTURE
    return None if key in NOTES or key.endswith(ENDINGS) or _only_numbers(value) else UNKNOWN


def _only_numbers(value: object) -> bool:
    left = [value]  # no recursion: what a stranger nests is deeper than a stack
    while left:
        one = left.pop()
        if isinstance(one, list):
            left += one
        elif not (one is None or isinstance(one, (bool, int, float))):
            return False
    return True
