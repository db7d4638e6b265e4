"""Prompt Tuning: where the prompt starts matters. Here it starts from a sentence of ours."""

import featherweight as fw

base = fw.load_base()
task = fw.load_task("movie-reviews", test_rows=30)

method = fw.PromptTuning(
    num_virtual_tokens=16,
    prompt_tuning_init_text="Is this movie review negative, neutral or positive?",
)
report = fw.train(base, task, method, steps=20)
total, trained = fw.count(base.model)
print(f"{trained:,} of {total:,} parameters learned a prompt of 16 vectors; loss {report.losses[-1]:.2f}")
print(f"accuracy {fw.evaluate(base, task).accuracy:.1%}")
