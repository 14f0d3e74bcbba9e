"""Models that look at a photo and answer: the skills, the models on offer and what runs them."""
