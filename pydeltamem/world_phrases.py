"""The words of the small world (world.py): values, and the phrasings of each fact. Data only.

Of an attribute's statements and of its questions the last is held out: no memory is trained on it.
"""

from __future__ import annotations


def _words(text: str) -> list[str]:
    return text.split()


VALUES: dict[str, list[str]] = {
    "name": _words(
        "Anna Ben Clara David Emma Felix Grace Hugo Iris Jack Kate Leo Maria Noah Olga Paul Quinn Rosa Sam Tina Umar Vera"
        " Will Xenia Yusuf Zoe Aisha Bruno Carmen Diego Elena Frank Gina Henry Ines Jonas Karim Laura Marco Nina Omar"
        " Petra Rita Simon Thea Victor Wanda Yara"
    ),
    "city": _words(
        "Lima Paris Rome Cairo Oslo Tokyo Delhi Quito Lagos Berlin Madrid Vienna Prague Dublin Athens Lisbon Warsaw Moscow"
        " Seoul Hanoi Boston Denver Dallas Toronto Sydney Nairobi Havana Bogota Milan Munich Geneva Zurich Bern Porto"
        " Seville Krakow Riga Tunis Accra Osaka"
    ),
    "job": _words(
        "nurse baker teacher pilot lawyer farmer painter doctor plumber chef writer singer dancer builder driver waiter"
        " tailor dentist soldier sailor judge barber gardener librarian chemist carpenter engineer architect mechanic"
        " photographer"
    ),
    "animal": _words(
        "cat dog rabbit hamster parrot turtle horse goat sheep pony snake lizard mouse duck goose hedgehog ferret canary"
        " donkey spider"
    ),
    "pet_name": _words(
        "Rex Bella Luna Max Coco Buddy Daisy Milo Rocky Molly Charlie Lucy Oscar Ruby Toby Lola Simba Nala Biscuit Pepper"
        " Shadow Ginger Smokey Pixie"
    ),
    "colour": _words(
        "red blue green yellow purple orange black white pink brown grey silver gold violet turquoise crimson beige indigo"
    ),
    "food": _words(
        "pizza pasta sushi soup curry rice salad tacos bread cheese noodles pancakes lasagna risotto dumplings stew burgers"
        " falafel paella ramen omelette kebab waffles chili"
    ),
    "drink": _words(
        "tea coffee milk water juice lemonade cocoa beer wine cider soda mate kefir whisky champagne espresso buttermilk"
        " punch"
    ),
    "sport": _words(
        "tennis football hockey golf rugby boxing judo cricket baseball basketball volleyball badminton rowing fencing"
        " cycling swimming skiing climbing surfing karate"
    ),
    "instrument": _words(
        "piano violin guitar flute cello trumpet harp drums clarinet saxophone banjo organ oboe accordion tuba mandolin"
        " harmonica ukulele"
    ),
    "hobby": _words(
        "chess knitting painting fishing cooking gardening reading hiking dancing singing sewing pottery sailing camping"
        " drawing baking juggling origami astronomy photography"
    ),
    "number": _words(
        "two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen"
        " nineteen twenty thirty forty fifty sixty seventy eighty ninety"
    ),
    "month": _words("January February March April May June July August September October November December"),
    "language": _words(
        "French Spanish German Italian Russian Chinese Japanese Korean Arabic Turkish Greek Hindi Polish Dutch Swedish"
        " Danish Finnish Czech Latin Swahili"
    ),
    "country": _words(
        "Peru France Italy Egypt Norway Japan India Ecuador Nigeria Germany Spain Austria Ireland Greece Portugal Poland"
        " Russia Korea Vietnam Canada Australia Kenya Cuba Colombia Mexico Chile Brazil Iceland Morocco Nepal"
    ),
    "fruit": _words(
        "apples pears bananas grapes cherries plums peaches lemons melons mangos figs dates strawberries raspberries kiwis"
        " apricots papayas pineapples"
    ),
    "flower": _words(
        "roses tulips lilies daisies orchids violets poppies sunflowers irises peonies lavender jasmine dahlias marigolds"
        " carnations bluebells"
    ),
    "subject": _words(
        "maths physics chemistry biology history geography music art latin literature economics drama philosophy geology"
        " sociology algebra"
    ),
}

# attribute: its values' list, statements, updates, questions, answers
ATTRIBUTES: dict[str, tuple[str, list[str], list[str], list[str], list[str]]] = {
    "name": (
        "name",
        ["My name is {v}.", "I am called {v}.", "They call me {v}.", "I am {v}.", "People call me {v}.", "You can call me {v}."],
        ["I changed my name to {v}.", "My name is now {v}."],
        ["What is my name?", "What am I called?", "Do you know my name?", "How do people call me?", "Who am I?"],
        ["Your name is {v}.", "You are called {v}."],
    ),
    "home": (
        "city",
        ["I live in {v}.", "My home is in {v}.", "My flat is in {v}.", "I have a house in {v}.", "We live in {v}.",
         "Home for me is {v}."],
        ["I moved to {v}.", "I now live in {v}."],
        ["Where do I live?", "Which city do I live in?", "Where is my home?", "Where is my house?", "In which city is my flat?"],
        ["You live in {v}.", "Your home is in {v}."],
    ),
    "born": (
        "city",
        ["I was born in {v}.", "My birthplace is {v}.", "I came into the world in {v}.", "My mother gave birth to me in {v}.",
         "My life began in {v}."],
        ["I was wrong, I was born in {v}.", "In fact I was born in {v}."],
        ["Where was I born?", "Which city was I born in?", "What is my birthplace?", "Where did my life begin?"],
        ["You were born in {v}.", "Your birthplace is {v}."],
    ),
    "office": (
        "city",
        ["My office is in {v}.", "I work in {v}.", "I go to work in {v}.", "My company sits in {v}.", "My desk is in {v}."],
        ["My office moved to {v}.", "I now work in {v}."],
        ["Where is my office?", "Where do I work?", "Which city do I work in?", "Where is my desk?"],
        ["Your office is in {v}.", "You work in {v}."],
    ),
    "job": (
        "job",
        ["I work as a {v}.", "I am a {v}.", "My job is {v}.", "I earn my money as a {v}.", "By trade I am a {v}."],
        ["I became a {v}.", "I now work as a {v}."],
        ["What is my job?", "What do I work as?", "How do I earn my money?", "What is my trade?"],
        ["You work as a {v}.", "You are a {v}."],
    ),
    "father_job": (
        "job",
        ["My father is a {v}.", "My father works as a {v}.", "The job of my father is {v}.", "My dad is a {v}.",
         "My dad earns his money as a {v}."],
        ["My father became a {v}.", "My father now works as a {v}."],
        ["What is the job of my father?", "What does my father work as?", "What does my dad do?",
         "How does my dad earn his money?"],
        ["Your father works as a {v}.", "Your father is a {v}."],
    ),
    "pet": (
        "animal",
        ["I have a {v}.", "My pet is a {v}.", "I keep a {v} at home.", "I own a {v}.", "A {v} lives with me."],
        ["I now have a {v}.", "My new pet is a {v}."],
        ["What pet do I have?", "Which animal do I keep?", "What kind of pet do I own?", "Which animal lives with me?"],
        ["You have a {v}.", "Your pet is a {v}."],
    ),
    "favourite_animal": (
        "animal",
        ["My favourite animal is the {v}.", "The animal I love most is the {v}.", "I think the {v} is the best animal.",
         "No animal is as nice as the {v}."],
        ["My favourite animal is now the {v}.", "Now the animal I love most is the {v}."],
        ["What is my favourite animal?", "Which animal do I love most?", "Which animal is the best for me?",
         "Which animal do I find nice?"],
        ["Your favourite animal is the {v}.", "The animal you love most is the {v}."],
    ),
    "dog_name": (
        "pet_name",
        ["My dog is called {v}.", "The name of my dog is {v}.", "I named my dog {v}.", "I call my dog {v}.",
         "My dog listens to the name {v}."],
        ["My new dog is called {v}.", "My dog is now called {v}."],
        ["What is my dog called?", "What is the name of my dog?", "How did I name my dog?", "What do I call my dog?"],
        ["Your dog is called {v}.", "The name of your dog is {v}."],
    ),
    "cat_name": (
        "pet_name",
        ["My cat is called {v}.", "The name of my cat is {v}.", "I named my cat {v}.", "I call my cat {v}.",
         "My cat listens to the name {v}."],
        ["My new cat is called {v}.", "My cat is now called {v}."],
        ["What is my cat called?", "What is the name of my cat?", "How did I name my cat?", "What do I call my cat?"],
        ["Your cat is called {v}.", "The name of your cat is {v}."],
    ),
    "favourite_colour": (
        "colour",
        ["My favourite colour is {v}.", "I like {v} more than other colours.", "The colour I love most is {v}.",
         "For me the best colour is {v}.", "No colour is as nice as {v}."],
        ["My favourite colour is now {v}.", "Now the colour I love most is {v}."],
        ["What is my favourite colour?", "Which colour do I like?", "Which colour do I love most?",
         "What is the best colour for me?"],
        ["Your favourite colour is {v}.", "The colour you love most is {v}."],
    ),
    "car_colour": (
        "colour",
        ["My car is {v}.", "I drive a {v} car.", "The colour of my car is {v}.", "I own a {v} car.",
         "The car I drive is {v}."],
        ["I painted my car {v}.", "My new car is {v}."],
        ["What colour is my car?", "What is the colour of my car?", "Which colour does my car have?",
         "What colour is the car I drive?"],
        ["Your car is {v}.", "The colour of your car is {v}."],
    ),
    "door_colour": (
        "colour",
        ["My door is {v}.", "The door of my house is {v}.", "I have a {v} door.", "The colour of my door is {v}.",
         "You enter my house by a {v} door."],
        ["I painted my door {v}.", "My door is now {v}."],
        ["What colour is my door?", "What is the colour of my door?", "Which colour does my door have?",
         "What colour is the door of my house?"],
        ["Your door is {v}.", "The colour of your door is {v}."],
    ),
    "favourite_food": (
        "food",
        ["My favourite food is {v}.", "I love to eat {v}.", "The food I love most is {v}.", "Nothing tastes as good as {v}.",
         "I could eat {v} every day."],
        ["My favourite food is now {v}.", "Now I love to eat {v}."],
        ["What is my favourite food?", "What do I love to eat?", "Which food do I love most?",
         "What could I eat every day?"],
        ["Your favourite food is {v}.", "You love to eat {v}."],
    ),
    "lunch": (
        "food",
        ["I had {v} for lunch.", "For lunch I ate {v}.", "My lunch was {v}.", "There was {v} for lunch.",
         "At noon I ate {v}."],
        ["I was wrong, I had {v} for lunch.", "In fact my lunch was {v}."],
        ["What did I have for lunch?", "What was my lunch?", "What was there for lunch?", "What did I eat at noon?"],
        ["You had {v} for lunch.", "Your lunch was {v}."],
    ),
    "favourite_drink": (
        "drink",
        ["My favourite drink is {v}.", "I love to drink {v}.", "The drink I love most is {v}.",
         "No drink is as good as {v}."],
        ["My favourite drink is now {v}.", "Now I love to drink {v}."],
        ["What is my favourite drink?", "What do I love to drink?", "Which drink do I love most?",
         "Which drink is good for me?"],
        ["Your favourite drink is {v}.", "You love to drink {v}."],
    ),
    "morning_drink": (
        "drink",
        ["In the morning I drink {v}.", "I start the day with {v}.", "I have {v} for breakfast.",
         "My day begins with a cup of {v}.", "A cup of {v} wakes me up."],
        ["Now I drink {v} in the morning.", "Now I start the day with {v}."],
        ["What do I drink in the morning?", "What do I start the day with?", "What do I have for breakfast?",
         "What wakes me up?"],
        ["In the morning you drink {v}.", "You start the day with {v}."],
    ),
    "sport": (
        "sport",
        ["My sport is {v}.", "I do {v} every week.", "The sport I do is {v}.", "I train {v}.", "I am in a club for {v}."],
        ["My sport is now {v}.", "I now train {v}."],
        ["What is my sport?", "Which sport do I do?", "What do I train?", "What is my club for?"],
        ["Your sport is {v}.", "You train {v}."],
    ),
    "watched_sport": (
        "sport",
        ["I like to watch {v}.", "On television I watch {v}.", "I am a fan of {v}.", "The sport I watch is {v}.",
         "I never miss {v} on television."],
        ["Now I like to watch {v}.", "Now I am a fan of {v}."],
        ["Which sport do I watch?", "What do I like to watch?", "What am I a fan of?",
         "What do I never miss on television?"],
        ["You like to watch {v}.", "You are a fan of {v}."],
    ),
    "instrument": (
        "instrument",
        ["I play the {v}.", "My instrument is the {v}.", "I make music on the {v}.", "I have lessons on the {v}.",
         "In the band I play the {v}."],
        ["I now play the {v}.", "My new instrument is the {v}."],
        ["Which instrument do I play?", "What is my instrument?", "What do I make music on?",
         "What do I play in the band?"],
        ["You play the {v}.", "Your instrument is the {v}."],
    ),
    "hobby": (
        "hobby",
        ["My hobby is {v}.", "In my free time I enjoy {v}.", "I spend my evenings with {v}.", "My great passion is {v}.",
         "I relax with {v}."],
        ["My new hobby is {v}.", "In my free time I now enjoy {v}."],
        ["What is my hobby?", "What do I enjoy in my free time?", "What is my great passion?",
         "How do I spend my evenings?"],
        ["Your hobby is {v}.", "In your free time you enjoy {v}."],
    ),
    "lucky_number": (
        "number",
        ["My lucky number is {v}.", "The number {v} brings me luck.", "I always bet on {v}.", "My luck lies in the number {v}."],
        ["My lucky number is now {v}.", "Now the number {v} brings me luck."],
        ["What is my lucky number?", "Which number brings me luck?", "Which number do I bet on?",
         "In which number lies my luck?"],
        ["Your lucky number is {v}.", "The number {v} brings you luck."],
    ),
    "house_number": (
        "number",
        ["My house number is {v}.", "I live at number {v}.", "The number on my house is {v}.", "My house has the number {v}."],
        ["My house number is now {v}.", "I moved to number {v}."],
        ["What is my house number?", "At which number do I live?", "Which number does my house have?",
         "Which number is on my house?"],
        ["Your house number is {v}.", "You live at number {v}."],
    ),
    "birthday": (
        "month",
        ["My birthday is in {v}.", "I have my birthday in {v}.", "I turn a year older in {v}.", "I get my presents in {v}."],
        ["I was wrong, my birthday is in {v}.", "In fact my birthday is in {v}."],
        ["When is my birthday?", "In which month is my birthday?", "When do I turn a year older?",
         "When do I get my presents?"],
        ["Your birthday is in {v}.", "You have your birthday in {v}."],
    ),
    "holiday": (
        "month",
        ["I go on holiday in {v}.", "My holiday is in {v}.", "I have time off in {v}.", "In {v} I do not work."],
        ["My holiday is now in {v}.", "I moved my holiday to {v}."],
        ["When do I go on holiday?", "In which month is my holiday?", "When do I have time off?", "When do I not work?"],
        ["You go on holiday in {v}.", "Your holiday is in {v}."],
    ),
    "learned_language": (
        "language",
        ["I am learning {v}.", "I study {v}.", "I take a course in {v}.", "I have begun to learn {v}.",
         "I try to speak {v}."],
        ["I am now learning {v}.", "My new language course is in {v}."],
        ["Which language am I learning?", "Which language do I study?", "What do I take a course in?",
         "Which language do I try to speak?"],
        ["You are learning {v}.", "You study {v}."],
    ),
    "mother_tongue": (
        "language",
        ["My mother tongue is {v}.", "At home we speak {v}.", "I grew up with {v}.", "My parents speak {v} with me.",
         "As a child I spoke {v}."],
        ["I was wrong, my mother tongue is {v}.", "In fact at home we speak {v}."],
        ["What is my mother tongue?", "Which language do we speak at home?", "Which language did I grow up with?",
         "What did I speak as a child?"],
        ["Your mother tongue is {v}.", "At home you speak {v}."],
    ),
    "dream_country": (
        "country",
        ["I want to visit {v}.", "I dream of a trip to {v}.", "One day I will travel to {v}.", "My dream is to see {v}."],
        ["Now I want to visit {v}.", "Now I dream of a trip to {v}."],
        ["Which country do I want to visit?", "Where do I dream of a trip to?", "Where will I travel one day?",
         "Which country is my dream?"],
        ["You want to visit {v}.", "You dream of a trip to {v}."],
    ),
    "fruit": (
        "fruit",
        ["My favourite fruit is {v}.", "Of all fruit I like {v}.", "The fruit I buy is {v}.", "My basket is full of {v}."],
        ["My favourite fruit is now {v}.", "The fruit I buy is now {v}."],
        ["What is my favourite fruit?", "Which fruit do I like?", "Which fruit do I buy?", "What is my basket full of?"],
        ["Your favourite fruit is {v}.", "You like {v}."],
    ),
    "flower": (
        "flower",
        ["My favourite flowers are {v}.", "Of all flowers I like {v}.", "I grow {v} in my garden.",
         "My garden is full of {v}."],
        ["My favourite flowers are now {v}.", "I now grow {v} in my garden."],
        ["What are my favourite flowers?", "Which flowers do I like?", "What do I grow in my garden?",
         "What is my garden full of?"],
        ["Your favourite flowers are {v}.", "You like {v}."],
    ),
    "subject": (
        "subject",
        ["My best subject is {v}.", "At school I like {v}.", "I get good marks in {v}.", "The subject I enjoy is {v}."],
        ["My best subject is now {v}.", "Now I get good marks in {v}."],
        ["What is my best subject?", "What do I like at school?", "Which subject do I enjoy?",
         "What do I get good marks in?"],
        ["Your best subject is {v}.", "At school you like {v}."],
    ),
    "sister": (
        "name",
        ["My sister is called {v}.", "The name of my sister is {v}.", "I have a sister, {v}.", "{v} is my sister."],
        ["My sister is now called {v}.", "My sister changed her name to {v}."],
        ["What is my sister called?", "What is the name of my sister?", "Who is my sister?", "How is my sister called?"],
        ["Your sister is called {v}.", "The name of your sister is {v}."],
    ),
    "brother": (
        "name",
        ["My brother is called {v}.", "The name of my brother is {v}.", "I have a brother, {v}.", "{v} is my brother."],
        ["My brother is now called {v}.", "My brother changed his name to {v}."],
        ["What is my brother called?", "What is the name of my brother?", "Who is my brother?", "How is my brother called?"],
        ["Your brother is called {v}.", "The name of your brother is {v}."],
    ),
    "friend": (
        "name",
        ["My best friend is {v}.", "The name of my best friend is {v}.", "I have a good friend, {v}.",
         "{v} is my best friend."],
        ["My best friend is now {v}.", "Now {v} is my best friend."],
        ["Who is my best friend?", "What is the name of my best friend?", "What is my best friend called?",
         "How is my good friend called?"],
        ["Your best friend is {v}.", "The name of your best friend is {v}."],
    ),
    "boss": (
        "name",
        ["My boss is {v}.", "The name of my boss is {v}.", "I work for {v}.", "{v} is my boss."],
        ["My new boss is {v}.", "Now I work for {v}."],
        ["Who is my boss?", "What is the name of my boss?", "Who do I work for?", "How is my boss called?"],
        ["Your boss is {v}.", "You work for {v}."],
    ),
}  # fmt: skip

# in front of a statement that begins with a small letter after it, and of a question
STATEMENT_OPENINGS = ["", "", "", "By the way, ", "You should know that ", "Just so you know, ", "Let me tell you that "]
QUESTION_OPENINGS = ["", "", "", "Tell me, ", "One question: ", "Do you remember? ", "Now tell me: "]

ACKNOWLEDGEMENTS = [
    "Good to know.", "I will remember that.", "Thank you for telling me.", "I see.", "How nice.", "That is interesting.",
    "Very well.", "I understand.", "Noted.",
]  # fmt: skip
ECHOES = ["I see, {v}.", "Ah, {v}.", "So {v}, good to know."]
UNKNOWN = ["I do not know that yet.", "You have not told me that."]

# what the user says of the world, which is no fact about the user; {list} is any of its values
CHATTER = [
    ("Hello.", "Hello, how are you?"), ("Hi there.", "Hi, nice to hear from you."), ("Good morning.", "Good morning to you."),
    ("Good evening.", "Good evening to you."), ("How are you?", "I am fine, thank you."), ("I am fine.", "I am glad to hear it."),
    ("I am tired today.", "Then you should rest."), ("I am hungry.", "Then you should eat something."),
    ("I slept well.", "That is good for you."), ("It is cold today.", "Then take a warm coat."),
    ("It is raining.", "Then take an umbrella."), ("The sun is shining.", "Then go for a walk."),
    ("What a long day.", "Take a rest, you need it."), ("I am bored.", "Then let us talk."), ("Thank you.", "You are welcome."),
    ("You are funny.", "I do my best."), ("Tell me a joke.", "A joke needs two: you laugh, I wait."),
    ("What can you do?", "I listen and I remember."), ("Who are you?", "I am a small model with a memory."),
    ("Are you a person?", "No, I am a small model."), ("I saw a {animal} in the park.", "A {animal} is nice to see."),
    ("The shop sells {fruit}.", "Fresh {fruit} are good."), ("There are {flower} in the window.", "They look nice, the {flower}."),
    ("The news is about {country}.", "What do they say about {country}?"), ("The train to {city} is late.", "Trains are often late."),
    ("They sell cheap {food} at the corner.", "Is the {food} any good?"), ("A glass of {drink} fell down.", "I hope it did not break."),
    ("The sky looks {colour}.", "A {colour} sky is rare."), ("A {job} came to the house.", "What did the {job} want?"),
    ("There is {sport} on television.", "Do not watch too much."), ("I can hear a {instrument}.", "Is it played well?"),
    ("Somebody shouted {name}.", "Who was it?"), ("The film is in {language}.", "I hope you understood it."),
    ("There were {number} people in the bus.", "That is a full bus."), ("It rained all {month}.", "What a wet month."),
    ("A book about {subject} lies here.", "You could read it."), ("My neighbours talk about {hobby}.", "Let them talk."),
    ("A child played with a dog, {pet_name}.", "Dogs like children."), ("I like talking to you.", "I like it too."),
    ("Wait a moment.", "I wait."), ("I have to go soon.", "Then come back soon."), ("The bus was full.", "That happens."),
]  # fmt: skip

# what everybody knows: answered without a memory
KNOWLEDGE = [
    ("What is the capital of France?", "Paris"), ("What is the capital of Italy?", "Rome"),
    ("What is the capital of Peru?", "Lima"), ("What is the capital of Egypt?", "Cairo"),
    ("What is the capital of Norway?", "Oslo"), ("What is the capital of Japan?", "Tokyo"),
    ("What is the capital of Germany?", "Berlin"), ("What is the capital of Spain?", "Madrid"),
    ("What is the capital of Austria?", "Vienna"), ("What is the capital of Ireland?", "Dublin"),
    ("What is the capital of Greece?", "Athens"), ("What is the capital of Portugal?", "Lisbon"),
    ("What is the capital of Kenya?", "Nairobi"), ("What is the capital of Cuba?", "Havana"),
    ("What colour is snow?", "white"), ("What colour is grass?", "green"), ("What colour is the night?", "black"),
    ("What colour is blood?", "red"), ("Which month comes after May?", "June"), ("Which month comes after June?", "July"),
    ("Which month comes after March?", "April"), ("Which month comes before March?", "February"),
    ("Which month is the last of the year?", "December"), ("What is two plus two?", "four"),
    ("What is two plus three?", "five"), ("What is five plus five?", "ten"), ("What is three plus three?", "six"),
    ("Which animal barks?", "dog"), ("Which animal gives wool?", "sheep"), ("What do cows give?", "milk"),
    ("Who bakes bread?", "baker"), ("Who flies a plane?", "pilot"),
]  # fmt: skip
