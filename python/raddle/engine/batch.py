"""A batch job: a file of requests in OpenAI's batch format, a file of results in the same.

Lines are read as the engine has room for them, in the order that a plan gives, and written when
they are answered. Whatever is wrong with a line is its own result, an error row, and nobody else's.
"""

import dataclasses
import hashlib
import time
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import ArgumentError, RaddleError
from .lines import HAS_RESULT, IS_BAD, WAITS, Lines
from .openai import RequestError, error_body, error_code, error_status, response_body
from .plan import POLICY, SAMPLE_RATE, Limits, Plan, cost_of
from .results import ResultsFile, line_id


@dataclass
class Summary:
    """What a job did, this time (seconds, tokens, plans) and in all (lines)."""

    num_lines: int
    num_done: int = 0
    num_errors: int = 0
    num_resumed: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    hit_tokens: int = 0  # of prompt_tokens, found in the prefix cache
    seconds: float = 0.0
    step_seconds: float = 0.0  # of the engine's steps
    predicted_seconds: float = 0.0  # the same, by the cost model
    bound_seconds: float = 0.0  # that no order of what was answered beats, likewise; at the end
    planned_hit_ratio: float = 0.0  # share of all prompts' tokens that others compute as well
    seconds_left: float | None = None  # as planned, at the pace so far; None: not known yet
    num_plans: int = 0
    planning_seconds: float = 0.0
    is_late: bool = False  # the deadline came before the end

    @property
    def pace(self):
        """Seconds that steps take for each that the cost model predicts; None before the first."""
        return self.step_seconds / self.predicted_seconds if self.predicted_seconds else None

    @property
    def share_of_bound(self):
        """The bound, at the pace that steps had, over the time that it took; None: not known."""
        if not (self.pace and self.bound_seconds and self.seconds):
            return None
        return self.bound_seconds * self.pace / self.seconds

    @property
    def hit_ratio(self):
        """The share of prompts' tokens that was found in the prefix cache."""
        return self.hit_tokens / max(1, self.prompt_tokens)


@dataclass
class Row:
    """A line that is being answered: one engine request per prompt."""

    line: int
    custom_id: str
    parsed: object
    answers: list = field(default_factory=list)  # per prompt, a list of n Outputs
    num_missing: int = 0


class BatchJob:
    """Answers the lines of input_path into output_path; the engine is lent.

    model_names: what a request's `model` may be, the first being the job's own. seed: of the
    requests without one. progress: called with the Summary after each step. schedule: one of
    raddle.blend.policy_names(). sample_rate: the share of requests that run first, so that lengths
    of outputs are seen (0: none; schedules that ask for no lengths need none). deadline: seconds
    from now, after which what has no answer is left for the next job. errors: "row", or "stop":
    ArgumentError that names all lines which would be error rows, before anything runs. cost: a
    raddle.blend.CostModel (default: rough rates); what steps take corrects it.
    """

    def __init__(
        self,
        engine,
        input_path,
        output_path,
        model_names,
        *,
        seed=0,
        progress=None,
        schedule=POLICY,
        sample_rate=SAMPLE_RATE,
        deadline=None,
        errors="row",
        cost=None,
    ):
        self._end = None if deadline is None else time.monotonic() + _seconds(deadline)
        self._engine, self._seed = engine, seed
        if errors not in ("row", "stop"):
            raise ArgumentError(f'errors: expected "row" or "stop", got {errors!r}')
        if Path(input_path).resolve() == Path(output_path).resolve():
            raise ArgumentError("--output: is the input file; name another one")
        self._lines = Lines(input_path, engine, list(model_names))
        self._progress = progress or (lambda summary: None)
        self._cost = cost_of(engine) if cost is None else cost
        self._rows = {}  # request id -> (Row, prompt index)
        self._records = []  # finished, not yet written
        try:
            self.results = ResultsFile(output_path)
        except BaseException:
            self._lines.close()
            raise
        try:
            self._lines.scan(self.results.done)
            self._check(errors)
            self._plan = self._make_plan(schedule, sample_rate)
        except BaseException:
            self.close()
            raise
        self._next_bad = 0
        self.summary = self._first_summary()

    def run(self):
        """Answer all that is missing. What is written stays written whatever ends the job."""
        engine, summary, begin = self._engine, self.summary, time.monotonic()
        before = engine.num_prompt_tokens, engine.num_output_tokens, engine.num_hit_tokens
        is_open = True
        try:
            while is_open or engine.has_work or self._records:
                if self._end is not None and time.monotonic() >= self._end:
                    summary.is_late = True
                    break
                while is_open and not self._has_enough():
                    line = self._next_line()
                    is_open = line is not None
                    if is_open:
                        self._submit(line)
                if engine.has_work:
                    self._step()
                self._write()
                summary.prompt_tokens = engine.num_prompt_tokens - before[0]
                summary.output_tokens = engine.num_output_tokens - before[1]
                summary.hit_tokens = engine.num_hit_tokens - before[2]
                summary.seconds = time.monotonic() - begin
                self._tell()
            summary.bound_seconds = self._plan.bound_seconds()
        finally:
            for request_id in list(self._rows):
                engine.abort(request_id)
            self._rows.clear()
            self.results.sync()
        return summary

    def close(self):
        self.results.close()
        self._lines.close()

    # ---- before it runs

    def _check(self, errors):
        """That results belong to these lines; with errors "stop", that no line is bad."""
        path, foreign = self.results.path, self.results.done
        if foreign:
            raise ArgumentError(
                f"{path}: answers line {min(foreign)} of another input file or for another model; "
                "name another output file, or remove this one"
            )
        if errors == "stop":
            bad = [f"{self._lines.path}:{number}: {error}" for number, error in self._lines.bad()]
            if bad:
                raise ArgumentError("\n".join([f"{len(bad)} lines are wrong:", *bad]))

    def _make_plan(self, schedule, sample_rate):
        lines = self._lines
        return Plan(
            lines.requests(),
            lines.request_begin,
            [state == WAITS for state in lines.states],
            self._cost,
            Limits.of(self._engine),
            policy=schedule,
            sample_rate=sample_rate,
            seed=self._seed,
        )

    def _first_summary(self):
        num_done = self._lines.states.count(HAS_RESULT)
        return Summary(
            len(self._lines),
            num_done=num_done,
            num_resumed=num_done,
            num_errors=self.results.num_errors,
            planned_hit_ratio=self._plan.hit_ratio,
        )

    # ---- while it runs

    def _has_enough(self):
        return self._engine.num_waiting >= self._engine.max_batch or len(self._records) >= 256

    def _next_line(self):
        """Bad lines come first: nothing has to be computed to say what is wrong with them."""
        states = self._lines.states
        while self._next_bad < len(states):
            self._next_bad += 1
            if states[self._next_bad - 1] == IS_BAD:
                return self._next_bad - 1
        return self._plan.next()

    def _step(self):
        begin = time.monotonic()
        outputs = self._engine.step()
        self.summary.step_seconds += time.monotonic() - begin
        self.summary.predicted_seconds += self._cost.step_seconds(*self._engine.last_work)
        for output in outputs:
            self._take(output)
        if self._plan.is_due:
            self._plan.make(self._so_far())

    def _so_far(self):
        """(request of the plan, tokens that it has given) of those that run."""
        for (line, prompt), row in self._rows.items():
            for index, count in self._engine.num_generated((line, prompt)).items():
                yield self._request(row, prompt, index), count

    def _request(self, row, prompt, index):
        return self._lines.request_begin[row.line] + prompt * row.parsed.params.n + index

    def _tell(self):
        summary, plan = self.summary, self._plan
        summary.num_plans, summary.planning_seconds = plan.num_plans, plan.planning_seconds
        if summary.pace is not None:
            summary.seconds_left = plan.seconds_left * summary.pace
        self._progress(summary)

    def _submit(self, line):
        custom_id, content = self._lines.read(line)
        added = []
        try:
            parsed = self._lines.parse(content)
            row = Row(line, custom_id, parsed)
            for i, prompt in enumerate(parsed.prompts):
                request_id = (line, i)
                params = parsed.params
                if params.seed is None:
                    params = dataclasses.replace(params, seed=self._seed_of(line, i))
                self._engine.add_request(prompt, params, request_id=request_id)
                added.append(request_id)
                row.answers.append([None] * parsed.params.n)
                row.num_missing += parsed.params.n
            self._rows.update({request_id: row for request_id in added})
        except RaddleError as error:
            for request_id in added:
                self._engine.abort(request_id)
            self._fail(line, custom_id, error)

    def _seed_of(self, line, prompt_index):
        """The same in every run of the job, wherever it was stopped."""
        text = f"{self._seed} {self._lines.numbers[line]} {prompt_index}".encode()
        return int.from_bytes(hashlib.sha256(text).digest()[:7], "little")

    def _take(self, output):
        row = self._rows.get(output.request_id)
        if row is None:  # of a row that failed
            return
        line, prompt = output.request_id
        row.answers[prompt][output.index] = output
        row.num_missing -= 1
        if output.finish_reason == "error":
            self._drop(row)
            error = RequestError(
                "the model's logits are not numbers: its weights or dtype do not suit this prompt",
                status=500,
                code="model_error",
            )
            self._fail(line, row.custom_id, error)
            return
        self._plan.end(self._request(row, prompt, output.index), len(output.token_ids))
        if row.num_missing == 0:
            self._drop(row)
            name = self._line_id(line).removeprefix("batch_req_")
            tokenizer, now = self._engine.tokenizer, int(time.time())
            body = response_body(row.parsed, row.answers, tokenizer, name, now)
            self._finish(line, row.custom_id, 200, body)

    def _drop(self, row):
        for i in range(len(row.answers)):
            self._rows.pop((row.line, i), None)
            self._engine.abort((row.line, i))

    def _line_id(self, line):
        return line_id(self._lines.digests[line], self._lines.numbers[line])

    def _fail(self, line, custom_id, error):
        for request in range(*self._lines.request_begin[line : line + 2]):
            self._plan.end(request, 0)
        self._finish(line, custom_id, error_status(error), error_body(error), error)

    def _finish(self, line, custom_id, status, body, error=None):
        name = self._line_id(line)
        self._records.append({
            "id": name,
            "custom_id": custom_id,
            "response": {
                "status_code": status,
                "request_id": name.replace("batch_req_", "req_"),
                "body": body,
            },
            "error": None if error is None else {
                "code": error_code(error), "message": str(error),
            },
        })  # fmt: skip

    def _write(self):
        self.results.append(self._records)
        self.summary.num_done += len(self._records)
        self.summary.num_errors += sum(r["error"] is not None for r in self._records)
        self._records = []


def _seconds(deadline):
    if isinstance(deadline, bool) or not isinstance(deadline, (int, float)) or not deadline >= 0:
        raise ArgumentError(f"deadline: expected seconds, 0 or more, got {deadline!r}")
    return deadline
