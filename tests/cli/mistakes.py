"""Mistakes on the command line, and the message that each of them must print."""

import re
from collections.abc import Iterator

from mmrec.cli.options import ALL_SETTINGS
from mmrec.config import Setting

BIG = 10**30


def wrong_values(setting: Setting) -> Iterator[str]:
    """Values of a setting's type that its rule forbids."""
    if setting.choices:
        yield "wrong"
    elif setting.rule:
        assert setting.minimum is not None
        if setting.type is int:
            yield str(int(setting.minimum) - 1)
            yield str(BIG)
        else:
            yield "nan"
            yield "inf"
            yield str(setting.minimum - (0 if setting.exclusive_minimum else 1))
            if setting.maximum is not None:
                yield str(setting.maximum + (0 if setting.exclusive_maximum else 1))


def setting_mistakes(
    command: str, before: str, skip: tuple[str, ...] = ()
) -> list[tuple[str, ...]]:
    """A mistake for each rule of each setting of a command.

    Args:
        command: name of the command.
        before: arguments that the command needs besides.
        skip: options to leave out.
    """
    from typer.main import get_command

    from mmrec.cli.main import app

    typer_command = get_command(app)
    for name in command.split():
        typer_command = typer_command.commands[name]  # type: ignore[attr-defined]
    return [
        (command, s.flag, f"{before} {s.flag}={value}", f"{s.flat_name} {re.escape(s.rule)}; got ")
        for s in ALL_SETTINGS.values()
        if s.flag not in skip and any(s.flag in p.opts for p in typer_command.params)
        for value in wrong_values(s)
    ]


# command, the option or argument at fault, arguments, pattern of standard error
MISTAKES = [
    ("", "COMMAND", "trian", "No such command 'trian'. Did you mean 'train'"),
    ("data", "COMMAND", "", "Missing command"),
    ("bench", "COMMAND", "skan", "No such command 'skan'"),
    ("compare", "RUN...", "runs/none", "runs/none must be a run folder; it holds no metrics.jsonl"),
    ("compare", "RUN...", "", "Missing argument 'RUN...'"),
    ("eval", "--plot", "--plot runs", "--plot must be a file to write; runs is a folder"),
    ("compare", "--out", "runs/one --out runs", "--out must be a file .*; runs is a folder"),
    ("compare", "--out", "runs/one --out book.txt", "book.txt is there already, .*no picture"),
    ("compare", "--out", "runs/one --out none/x.png", "there is no folder none"),
    (
        "compare",
        "--out",
        "runs/one --out runs/one/metrics.jsonl --force",
        "--out must not be a file that is read, and runs/one/metrics.jsonl is one",
    ),
    ("compare", "--out", "runs/one --json --out x.png", "--json draws nothing: leave out --out"),
    ("eval", "--plot", "--plot book.txt", "book.txt is there already, and mmrec wrote no picture"),
    (
        "eval",
        "--plot",
        "--data book.txt --plot book.txt --force",
        "--plot must not be a file that is read, and book.txt is one: choose another --plot",
    ),
    ("eval", "--plot", "--plot none/x.png", "--plot must lie in a folder that exists; .* none"),
    (
        "eval",
        "--report",
        "--prompts short.txt --report word.toml",
        "word.toml is there already, and mmrec wrote no report there",
    ),
    ("eval", "--force", "--force", "--force overwrites --plot or --report; give one of them"),
    (
        "train",
        "PRESET",
        "tinny",
        "unknown preset 'tinny': expected one of tiny, .*; did you mean 'tiny'",
    ),
    ("train", "PRESET", "", "name a preset: mmrec train tiny"),
    ("train", "PRESET", "tiny mini", "unexpected extra argument\\(s\\) \\(mini\\)"),
    ("train", "--config", "--config none.toml", "cannot read config file none.toml: No such file"),
    ("train", "--config", "--config .", "cannot read config file .: Is a directory"),
    ("train", "--config", "--config cut.toml", "config file cut.toml is not TOML"),
    (
        "train",
        "--config",
        "--config word.toml",
        "unknown setting 'lrr' in .optimizer. of word.toml; did you mean 'lr'",
    ),
    ("train", "--config", "--config cut.h5", "config file cut.h5 is not TOML"),
    ("train", "--data", "tiny --data stdlob", "unknown corpus 'stdlob'.*did you mean 'stdlib'"),
    ("train", "--data", "tiny --data none.txt", "no data at none.txt: no such file or folder"),
    ("train", "--data", "tiny --data *.none", "no file matches \\*.none"),
    (
        "train",
        "--data",
        "tiny --data run*",
        "no file matches run\\*; it matches folders: end it",
    ),
    ("train", "--data", "tiny --data **/none.txt", "no file matches \\*\\*/none.txt"),
    ("train", "--data", "tiny --data none**.txt", "no file matches none\\*\\*.txt"),
    ("train", "--data", "tiny --data [none", "no file matches \\[none"),
    ("train", "--data", "tiny --data ~nosuchuser/x", "no data at ~nosuchuser/x: no such file"),
    ("train", "--data", "tiny --data ~none.txt", "no data at ~none.txt: no such file"),
    (
        "train",
        "--data",
        "tiny --data book.txt,short.txt",
        "no data at book.txt,short.txt: .*; a mixture is written .*3:code/,1:book.txt",
    ),
    ("train", "--data", "tiny --data=", "--data must not be empty; got ''"),
    (
        "train",
        "--data",
        "tiny --data book.txt --data stdlib",
        "--data must be given once; got it 2 times; a mixture is written 3:code/,1:book.txt",
    ),
    ("train", "--config", "--config=", "--config must not be empty; got ''"),
    ("train", "--out", "tiny --out=", "--out must not be empty; got ''"),
    ("train", "--out", "tiny --out a\x00b", "out must be text in UTF-8 without a NUL, .*; got 'a"),
    ("train", "--out", "tiny --out caf\udce9", "out must be text in UTF-8 .*; got 'caf.udce9'"),
    ("train", "--val-file", "tiny --val-file=", "--val-file must not be empty; got ''"),
    ("train", "--steps", "tiny --steps 3 --steps 4", "--steps must be given once; got it 2 times"),
    ("generate", "--model", "--model= --prompt x", "--model must not be empty; got ''"),
    (
        "generate",
        "--prompt",
        "--prompt a --prompt b",
        "--prompt must be given once; got it 2 times",
    ),
    (
        "train",
        "--data",
        "tiny --data bad.txt",
        "bad.txt must be UTF-8 text; byte 0xff at offset 3 is not",
    ),
    ("train", "--data", "tiny --data empty.txt", "empty.txt is empty"),
    (
        "train",
        "--data",
        "tiny --data short.txt --tokenizer byte",
        "one batch needs 16 windows of 256",
    ),
    (
        "train",
        "--data",
        "tiny --data short.txt --tokenizer byte --batch-size 1 --seq-len 20",
        "validation split must hold one window of 21 tokens",
    ),
    ("train", "--data", "tiny --data cut.h5", "corpus cut.h5 is damaged or truncated"),
    ("train", "--data", "tiny --data newer.h5", "newer.h5 must be a corpus; it is a checkpoint"),
    (
        "train",
        "--text-field",
        "tiny --data records.jsonl --text-field body",
        "records.jsonl line 1 must have a field 'body' .*; its fields are: text, url",
    ),
    ("train", "--data", "tiny --data records.jsonl", "records.jsonl line 2 must be JSON"),
    ("train", "--data", "tiny --data hf:a:b:c:d", "must be hf:NAME\\[:CONFIG\\]\\[:SPLIT\\]"),
    (
        "train",
        "--data",
        "tiny --data 0:book.txt,1:stdlib",
        "weights of a mixture must be > 0; got 0:book.txt,1:stdlib",
    ),
    (
        "train",
        "--data",
        "tiny --data 1:book.txt,1:book.txt --tokenizer byte",
        "book.txt must have training text of its own; it has 1 document, 1 of them copies of other",
    ),
    (
        "train",
        "--data",
        "tiny --data 1:book.txt,1:short.txt --tokenizer byte",
        "each source of a mixture must hold one window of 257 training tokens; short.txt has 79",
    ),
    (
        "train",
        "--seq-len",
        "tiny --data book.txt --tokenizer byte --seq-len 1000000",
        "one batch needs 16 windows of 1,000,000 tokens = 16,000,001; the training split has",
    ),
    ("train", "--val-file", "tiny --data book.txt --val-file none.txt", "no data at none.txt"),
    (
        "train",
        "--val-file",
        "tiny --data book.txt --val-file empty.txt",
        "the validation text empty.txt is empty",
    ),
    (
        "train",
        "--val-file",
        "tiny --data - --val-file -",
        "a pipe can be read only once; got it twice, as - and as -",
    ),
    (
        "train",
        "--val-file",
        "tiny --data book.txt --val-file char.h5",
        "val_file must be a text; got the corpus file char.h5",
    ),
    ("train", "--data", "tiny --data 1:-,1:-", "a pipe can be read only once"),
    (
        "train",
        "--val-fraction",
        "tiny --data book.txt --val-file short.txt --val-fraction 0.2",
        "--val-fraction has no effect: the validation text is short.txt",
    ),
    (
        "train",
        "--vocab",
        "tiny --data book.txt --tokenizer byte --vocab 300",
        "--vocab has no effect: .* the tokenizer is byte",
    ),
    (
        "train",
        "--tokenizer",
        "tiny --data char.h5 --tokenizer byte",
        "--tokenizer has no effect: char.h5 has the tokenizer char",
    ),
    *[
        (command, flag, f"{before}char.h5 {flag} {value}", f"{flag} has no effect: char.h5 is prep")
        for command, before in (("train", "tiny --data "), ("data inspect", ""))
        for flag, value in (
            ("--max-bytes", "9"),
            ("--val-fraction", "0.2"),
            ("--val-file", "short.txt"),
            ("--text-field", "body"),
            ("--skip-bad", ""),
        )
    ],
    ("train", "--skip-bad", "tiny --skip-bad", "--skip-bad has no effect: the built-in corpus std"),
    (
        "train",
        "--text-field",
        "tiny --data book.txt --text-field body",
        "--text-field names a field of records; book.txt holds text without fields",
    ),
    ("train", "--data", "tiny --data zip.txt", "zip.txt must be text .*; it is a zip archive"),
    ("train", "--data", "tiny --data tar.txt", "it is a tar archive: extract it first"),
    ("train", "--data", "tiny --data nul.txt", "nul.txt must be text; it has a NUL byte at offset"),
    ("train", "--data", "tiny --data pretty.json", "pretty.json line 1 must be JSON, one object"),
    (
        "train",
        "--data",
        "tiny --data latin.txt --skip-bad",
        "holds no text .* skipped: 1, the first because latin.txt must be UTF-8",
    ),
    (
        "train",
        "--val-file",
        "tiny --data book.txt --val-file book.txt",
        "book.txt must have training text of its own; .* near-duplicates of the validation text",
    ),
    (
        "train",
        "--vocab",
        "tiny --vocab 10",
        "bpe vocabulary must hold at least 257 tokens, .*; got 10",
    ),
    (
        "train",
        "--vocab",
        f"tiny --vocab {BIG}",
        "vocab must be a whole number from 0 .*; got 1000000",
    ),
    ("train", "--steps", "tiny --steps 1.5", "'--steps': .* integer.*; got '1.5'"),
    ("train", "--steps", "tiny --steps", "'--steps' requires an argument"),
    ("train", "--steps", "tiny --stpes 4", "No such option: --stpes.*--steps"),
    ("train", "--minutes", "tiny --steps 5 --minutes 1", "only one of steps, epochs, minutes"),
    ("train", "--lr", "tiny --lr fast", "'--lr': .*; got 'fast'"),
    (
        "train",
        "--layer-types",
        "tiny --layer-types q",
        "layer_types must be letters out of .*; got 'q'",
    ),
    (
        "train",
        "--keep-checkpoints",
        "tiny --keep-checkpoints 0 --on-nan rollback",
        "keep_checkpoints must be >= 1 with on_nan rollback",
    ),
    (
        "train",
        "--out",
        "--config small.toml --data book.txt --out small.toml",
        "the run folder small.toml must be a folder; it is a file",
    ),
    (
        "train",
        "--out",
        "--config small.toml --data book.txt --out /proc/none",
        "cannot write in the run folder /proc/none",
    ),
    (
        "train",
        "--out",
        "--config small.toml --data book.txt --out runs/one",
        "runs/one already holds a run: choose another --out",
    ),
    (
        "train",
        "--out",
        "--config exp/config.toml --data book.txt --out exp",
        "--out must not be a file that is read, and exp/config.toml is one: choose another",
    ),
    (
        "train",
        "--out",
        "--config exp/config.toml --data book.txt --out exp --force",
        "--out must not be a file that is read, and exp/config.toml is one: choose another",
    ),
    (
        "train",
        "--out",
        "--config small.toml --data book.txt --out exp",
        "exp/config.toml is there already, and no run wrote it: choose another --out",
    ),
    (
        "train",
        "--out",
        "--config small.toml --initialize-from runs/one --data book.txt --out runs/one --force",
        "runs/one already holds a run, and runs/one/best.h5 of it is read: choose another --out",
    ),
    (
        "train",
        "--resume",
        "--resume --out exp",
        "no run at exp to resume: no run wrote its config.toml; begin one with it: mmrec train",
    ),
    (
        "train",
        "--data",
        "--resume --out runs/one --data short.txt",
        "the text of .*short.txt is another one.* a run continues with the same text only",
    ),
    (
        "train",
        "--replay-data",
        "--resume --out runs/one --replay-data short.txt",
        "--replay-data has no effect: the run was started without a replay",
    ),
    (
        "train",
        "--parallel",
        "tiny --parallel ddp",
        "--parallel needs .*: torchrun --nproc-per-node 2 -m mmrec train tiny --parallel ddp",
    ),
    (
        "train",
        "--parallel",
        "tiny --parallel dpp",
        "parallel must be one of ddp, fsdp; got 'dpp'; did you mean 'ddp'",
    ),
    (
        "train",
        "--resume",
        "--resume --lr 1",
        "--resume keeps the settings of its run; --lr cannot be given",
    ),
    (
        "train",
        "--resume",
        "tiny --resume",
        "--resume keeps the settings of its run; PRESET cannot be given",
    ),
    (
        "train",
        "--resume",
        "--resume --config small.toml",
        "--resume keeps .*; --config cannot be given",
    ),
    (
        "train",
        "--resume",
        "--resume --out nowhere",
        "no run at nowhere to resume: expected a folder with a config.toml",
    ),
    ("train", "--force", "--resume --force", "--resume keeps .*; --force cannot be given"),
    ("eval", "[RUN|CHECKPOINT]...", "nowhere", "no checkpoint at nowhere: no such file"),
    (
        "eval",
        "[RUN|CHECKPOINT]...",
        "runs",
        "no checkpoint in runs: expected best.h5, last.h5 or step-N.h5",
    ),
    ("eval", "[RUN|CHECKPOINT]...", "cut.h5", "checkpoint cut.h5 is damaged or truncated"),
    ("eval", "[RUN|CHECKPOINT]...", "text.h5", "text.h5 is not an HDF5 file"),
    (
        "eval",
        "[RUN|CHECKPOINT]...",
        "older.h5",
        "earlier mmrec \\(schema 1; this one reads from \\d on\\): train it again",
    ),
    (
        "eval",
        "[RUN|CHECKPOINT]...",
        "newer.h5",
        "newer mmrec \\(schema 99; this one reads up to \\d\\): upgrade mmrec",
    ),
    ("eval", "--data", "--data bad.txt", "bad.txt must be UTF-8"),
    ("eval", "--data", "--data none.txt", "no data at none.txt"),
    ("eval", "--data", "--data empty.txt", "empty.txt is empty"),
    ("eval", "--data", "--data other.h5", "other.h5 must have the tokenizer of .*; it has another"),
    ("eval", "--text-field", "--data records.jsonl --text-field body", "must have a field 'body'"),
    (
        "eval",
        "[RUN|CHECKPOINT]...",
        "runs/one char",
        "one model at a time is scored; got 2: --prompts takes several",
    ),
    ("eval", "--prompts", "--prompts none.txt", "cannot read none.txt: No such file"),
    ("eval", "--prompts", "--prompts empty.txt", "empty.txt must hold prompts, one per line"),
    ("eval", "--prompts", "--prompts bad.txt", "bad.txt must be UTF-8 text"),
    (
        "eval",
        "--prompts",
        "--prompts records.jsonl",
        "records.jsonl line 1 must have a field 'prompt' .*; its fields are: text, url",
    ),
    ("eval", "--prompts", "--prompts zip.txt", "zip.txt must be text .*; it is a zip archive"),
    (
        "eval",
        "--text-field",
        "--prompts short.txt --text-field body",
        "--text-field names a field of records; short.txt holds text without fields",
    ),
    ("eval", "--text-field", "--text-field body", "--text-field is for .* --data; got no --data"),
    ("eval", "--skip-bad", "--data char.h5 --skip-bad", "--skip-bad is for .*; got char.h5"),
    *[
        (
            "eval",
            option.split()[0],
            f"{mode} {option}",
            f"{option.split()[0]} has no effect {reason}",
        )
        for mode, option, reason in (
            ("--tasks x", "--text-field body", "with --tasks"),
            ("--prompts short.txt", "--data book.txt", "with --prompts"),
            ("--prompts short.txt", "--plot a.png", "with --prompts"),
            ("--prompts short.txt", "--tasks x", "with --prompts"),
            ("--tasks x", "--report a.md", "with --tasks"),
            ("", "--temperatures 1", "without --prompts"),
            ("", "--max-tokens 9", "without --prompts"),
            ("--data book.txt", "--include-path runs", "without --tasks"),
        )
    ],
    (
        "eval",
        "--text-field",
        "--data book.txt --text-field body",
        "--text-field names a field of records; book.txt holds text without fields",
    ),
    ("eval", "--data", "--data latin.txt --skip-bad", "holds no text .* skipped: 1, the first"),
    ("eval", "--data", "--data utf16.txt", "utf16.txt .*; it is UTF-16: convert it .* iconv"),
    (
        "eval",
        "--temperatures",
        "--prompts short.txt --temperatures 0,warm",
        "--temperatures must be numbers joined by commas; got '0,warm'",
    ),
    (
        "eval",
        "--temperatures",
        "--prompts short.txt --temperatures -1",
        "temperature must be finite and >= 0; got -1",
    ),
    ("eval", "--max-tokens", "--prompts short.txt --max-tokens 0", "'--max-tokens': .*1; got '0'"),
    ("eval", "--report", "--prompts short.txt --report r.pdf", "must end in .md or .html; got r.p"),
    ("eval", "--report", "--prompts short.txt --report runs", "--report must be a file to write"),
    ("eval", "--tasks", "--tasks none-such", "the harness has no task 'none-such'"),
    ("eval", "--include-path", "--tasks x --include-path none", "must be a folder of tasks; none"),
    (
        "generate",
        "--model",
        "--model nowhere.h5 --prompt x",
        "no checkpoint at nowhere.h5: no such file",
    ),
    ("generate", "--model", "--model text.h5 --prompt x", "text.h5 is not an HDF5 file"),
    ("generate", "--prompt", "--prompt", "'--prompt' requires an argument"),
    (
        "generate",
        "--prompt",
        "--model char --prompt ☃",
        "prompt, line 1, character 1: .*'☃' .U.2603",
    ),
    ("eval", "--prompts", "char --prompts snow.txt", "prompt 2, line 1, character 4: .*'☃'"),
    ("eval", "--data", "char --data snow.txt", "snow.txt, line 2, character 4: the character '☃'"),
    ("generate", "--max-tokens", "--prompt x --max-tokens -1", "max_tokens must be >= 0; got -1"),
    (
        "generate",
        "--temperature",
        "--prompt x --temperature -1",
        "temperature must be finite and >= 0; got -1",
    ),
    (
        "generate",
        "--temperature",
        "--prompt x --temperature nan",
        "temperature must be finite and >= 0; got nan",
    ),
    (
        "generate",
        "--top-k",
        "--prompt x --top-k -1",
        "top_k must be a whole number from 0 .*; got -1",
    ),
    ("generate", "--top-p", "--prompt x --top-p 0", "top_p must lie in \\(0, 1\\]; got 0"),
    ("generate", "--min-p", "--prompt x --min-p 2", "min_p must lie in \\[0, 1\\]; got 2"),
    (
        "generate",
        "--repetition-penalty",
        "--prompt x --repetition-penalty 0",
        "repetition_penalty must be finite and > 0; got 0",
    ),
    ("generate", "--seed", "--prompt x --seed -1", "'--seed': .*; got '-1'"),
    ("generate", "--seed", f"--prompt x --seed {BIG}", "'--seed': .*; got '1000"),
    ("generate", "--stop", "--prompt x --stop=", "a stop text must not be empty"),
    (
        "train",
        "--initialize-from",
        "tiny --initialize-from none",
        "no checkpoint at none: no such file",
    ),
    (
        "train",
        "--initialize-from",
        "--config small.toml --initialize-from char --tokenizer byte",
        "keeps the tokenizer of its source, char of .*: leave out --tokenizer .*; got byte",
    ),
    (
        "train",
        "--initialize-from",
        "tiny --initialize-from runs/one --vocab 300",
        "keeps the tokenizer of its source, byte of 257: .*; got byte of 300",
    ),
    (
        "train",
        "--initialize-from",
        "tiny --initialize-from runs/one --layer-types l",
        "must hold the source's in their order.*'nn', the grown ones 'llll'",
    ),
    (
        "train",
        "--initialize-from",
        "tiny --initialize-from runs/one --layer-types b --data char.h5",
        "char.h5 must have the tokenizer of the model",
    ),
    (
        "train",
        "--initialize-from",
        "--resume --initialize-from char",
        "--resume keeps .*; --initialize-from cannot",
    ),
    ("grow", "RUN|CHECKPOINT", "none --to mini", "no checkpoint at none: no such file"),
    ("grow", "RUN|CHECKPOINT", "runs/one", "say what to grow: --to PRESET, --vocab, --data, or"),
    ("grow", "RUN|CHECKPOINT", "runs/one --width 32", "nothing to grow: .* has this shape already"),
    ("grow", "RUN|CHECKPOINT", "text.h5 --to mini", "text.h5 is not an HDF5 file"),
    ("grow", "RUN|CHECKPOINT", "older.h5 --to mini", "earlier mmrec .schema 1"),
    ("grow", "--to", "runs/one --to minni", "unknown preset 'minni'.*did you mean 'mini'"),
    ("grow", "--width", "runs/one --width 16", "never shrinks: the width must be .* 32; got 16"),
    ("grow", "--width", "runs/one --width 33", "heads must divide the width 33; got 2"),
    ("grow", "--depth", "runs/one --depth 1", "the depth must be at least the source's 2; got 1"),
    ("grow", "--depth", f"runs/one --depth {BIG}", "depth must be a whole number from 1 to"),
    ("grow", "--heads", "runs/one --heads 4", "the width of a head must be .* 16; got 8"),
    (
        "grow",
        "--ffn-multiplier",
        "runs/one --ffn-multiplier 0.5",
        "the feed-forward width must be .*; got 16",
    ),
    ("grow", "--layer-types", "runs/one --layer-types l", "must hold the source's in their order"),
    ("grow", "--vocab", "runs/one --vocab 300", "only a bpe vocabulary can grow; .* is 'byte'"),
    ("grow", "--vocab", "char --vocab 300", "is 'char': grow --data without --vocab adds char"),
    ("grow", "--data", "char --data book.txt", "knows every character of book.txt already"),
    ("grow", "--vocab", "bpe --vocab 300", "must hold more than the 300 tokens .*; got 300"),
    ("grow", "--data", "bpe --vocab 400 --data none.txt", "no data at none.txt"),
    ("grow", "--data", "runs/one --width 64 --data book.txt", "--vocab takes .*; give both"),
    (
        "grow",
        "--method",
        "runs/one --width 64 --method wish",
        "method must be one of preserve, stack, random; got 'wish'",
    ),
    ("grow", "--seed", "runs/one --width 64 --seed -1", "'--seed': .*; got '-1'"),
    ("grow", "--out", "runs/one --width 64 --out runs", "--out must be a file .*; runs is a"),
    ("grow", "--out", "runs/one --width 64 --out book.txt", "book.txt is there already"),
    (
        "grow",
        "--out",
        "runs/one --width 64 --out runs/one/best.h5 --force",
        "--out must not be a file that is read, and runs/one/best.h5 is one",
    ),
    (
        "finetune",
        "--out",
        "runs/one --data book.txt --out runs/one --force",
        "runs/one already holds a run, and runs/one/best.h5 of it is read: choose another --out",
    ),
    ("finetune", "RUN|CHECKPOINT", "none --data book.txt", "no checkpoint at none: no such file"),
    ("finetune", "RUN|CHECKPOINT", "older.h5 --data book.txt", "earlier mmrec .schema 1"),
    ("finetune", "--data", "runs/one", "Missing option '--data'"),
    ("finetune", "--data", "runs/one --data none.txt", "no data at none.txt"),
    ("finetune", "--old-data", "runs/one --data - --old-data -", "a pipe can be read only once"),
    (
        "finetune",
        "--max-bytes",
        "runs/one --data char.h5 --max-bytes 9",
        "--max-bytes has no effect: char.h5 is prepared already",
    ),
    (
        "finetune",
        "--data",
        "runs/one --data char.h5",
        "char.h5 must have the tokenizer of the model",
    ),
    (
        "finetune",
        "--old-data",
        "runs/one --data book.txt --old-data none.txt",
        "no data at none.txt",
    ),
    (
        "finetune",
        "--old-data",
        "runs/one --data book.txt --batch-size 4 --replay-fraction 0.5 --old-data short.txt",
        "one batch needs 4 windows of .*; the earlier text short.txt has 79",
    ),
    (
        "finetune",
        "--lora-rank",
        "runs/one --data book.txt --lora-rank 33",
        "lora_rank .* 32.*; got 33",
    ),
    (
        "finetune",
        "--lora-alpha",
        "runs/one --data book.txt --lora-alpha 4",
        "--lora-alpha needs --lora-rank, the rank; got 4.0 alone",
    ),
    (
        "finetune",
        "--matrix-lr",
        "runs/one --data book.txt --lora-rank 2 --matrix-lr 1e-3",
        "--matrix-lr has no effect with --lora-rank: set --lr; got 0.001",
    ),
    (
        "finetune",
        "--freeze",
        "runs/one --data book.txt --freeze layers:1-2",
        "freeze must name layers from 0 to 1, .*; got 'layers:1-2'",
    ),
    (
        "finetune",
        "--freeze",
        "runs/one --data book.txt --freeze embeddings,layers:0-1",
        "freeze must leave .*; got 'emb",
    ),
    (
        "finetune",
        "--replay-fraction",
        "runs/one --data book.txt --replay-fraction 0.1 --old-data bad.txt",
        "bad.txt must be UTF-8",
    ),
    (
        "finetune",
        "--out",
        "runs/one --data book.txt --out runs/one",
        "runs/one already holds a run",
    ),
    ("chain", "RECIPE", "none.toml", "cannot read recipe none.toml: No such file"),
    ("chain", "RECIPE", "cut.toml", "recipe cut.toml is not TOML"),
    ("chain", "RECIPE", "taken.toml", "exp/report.json is there already, and mmrec wrote no stag"),
    (
        "chain",
        "RECIPE",
        "chain.toml",
        "chain.toml must hold one \\[\\[stage\\]\\] or more; it holds",
    ),
    ("info", "PRESET", "huge", "unknown preset 'huge'"),
    ("info", "PRESET", "", "Missing argument 'PRESET'"),
    ("info", "--vocab", "tiny --vocab 1", "'--vocab': .*2; got '1'"),
    ("data prepare", "[source]", "none/", "no data at none/"),
    (
        "data prepare",
        "--vocab",
        "book.txt --vocab 3",
        "vocabulary must hold at least 257 tokens, .*; got 3",
    ),
    ("data prepare", "--out", "book.txt --out .", "--out must end in .h5 or .hdf5.*; got .:"),
    ("data prepare", "--out", "book.txt --out runs.h5", "--out must be a file .*; runs.h5 is a f"),
    (
        "data prepare",
        "--out",
        "book.txt --out book.txt --force",
        "--out must not be a file that is read, and book.txt is one: choose another --out",
    ),
    ("data prepare", "--out", "book.txt --out corp", "got corp: name it corp.h5"),
    ("data prepare", "--out", "book.txt --out text.h5", "text.h5 is there already, .*no corpus"),
    ("data prepare", "--out", "char.h5 --out new.h5", "char.h5 is a prepared corpus already"),
    ("data prepare", "--force", "book.txt --force", "--force overwrites --out; give both"),
    ("data inspect", "[source]", "text.h5", "text.h5 is not an HDF5 file"),
    (
        "data inspect",
        "--vocab",
        "book.txt --vocab 3",
        "vocabulary must hold at least 257 tokens, .*; got 3",
    ),
    (
        "data prepare",
        "--text-field",
        "records.jsonl --text-field body",
        "its fields are: text, url",
    ),
    ("data prepare", "--val-file", "book.txt --val-file bad.txt", "bad.txt must be UTF-8 text"),
    (
        "data inspect",
        "--text-field",
        "records.jsonl --text-field body",
        "its fields are: text, url",
    ),
    ("data inspect", "--val-file", "book.txt --val-file bad.txt", "bad.txt must be UTF-8 text"),
    (
        "finetune",
        "--text-field",
        "runs/one --data records.jsonl --text-field body",
        "its fields are: text, url",
    ),
    (
        "finetune",
        "--val-file",
        "runs/one --data book.txt --val-file bad.txt",
        "bad.txt must be UTF-8 text",
    ),
    (
        "bench scan",
        "--shape",
        "--shape 4x5",
        "--shape must be . sizes joined by 'x', .*; got '4x5'",
    ),
    ("bench scan", "--shape", "--shape 4x0x5x6", "--shape must be . sizes .*; got '4x0x5x6'"),
    ("bench scan", "--repeats", "--repeats 2", "'--repeats': .*3; got '2'"),
    (
        "bench gated-recurrence",
        "--shape",
        "--shape 4x5",
        "--shape must be . sizes joined by 'x', .*; got '4x5'",
    ),
    (
        "bench gated-recurrence",
        "--shape",
        "--shape 4x0x5x6",
        "--shape must be . sizes .*; got '4x0x5x6'",
    ),
    ("bench gated-recurrence", "--repeats", "--repeats 2", "'--repeats': .*3; got '2'"),
    (
        "bench gated-delta-rule",
        "--shape",
        "--shape 4x5",
        "--shape must be . sizes joined by 'x', .*; got '4x5'",
    ),
    (
        "bench gated-delta-rule",
        "--shape",
        "--shape 4x0x5x6",
        "--shape must be . sizes .*; got '4x0x5x6'",
    ),
    ("bench gated-delta-rule", "--repeats", "--repeats 2", "'--repeats': .*3; got '2'"),
    ("bench scan", "--shape", "--shape 999999999x9999999x99", "not enough memory: smaller sizes"),
    ("bench train", "PRESET", "tinny", "unknown preset 'tinny'.*did you mean 'tiny'"),
    ("bench train", "--vocab", "tiny --vocab 1", "'--vocab': .*2; got '1'"),
    (
        "bench train",
        "--batch-size",
        "tiny --batch-size 999999999 --seq-len 1000",
        "not enough memory: smaller sizes",
    ),
    *setting_mistakes("train", "tiny"),
    *setting_mistakes("finetune", "runs/one --data book.txt", skip=("--lora-alpha",)),
    (
        "finetune",
        "--lora-alpha",
        "runs/one --data book.txt --lora-rank 2 --lora-alpha 0",
        "lora_alpha must be finite and > 0; got 0",
    ),
    ("train", "--freeze", "tiny --data book.txt --freeze heads", "freeze must be .*; got 'heads'"),
    (
        "train",
        "--replay-data",
        "tiny --data book.txt --tokenizer char --replay-fraction 0.1 --replay-data none.txt",
        "no data at none.txt",
    ),
    *setting_mistakes("grow", "runs/one", skip=("--vocab", "--seed")),
    *setting_mistakes("info", "tiny", skip=("--vocab",)),
    *setting_mistakes("bench train", "tiny", skip=("--vocab",)),
    *setting_mistakes("data prepare", "book.txt"),
    *setting_mistakes("data inspect", "book.txt"),
]
