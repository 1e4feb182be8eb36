"""The language-model job: data, training, evaluation, generation."""
