"""The words of the small world (world.py): values, and the phrasings of each fact. Data only.

Of an attribute's statements, of its updates and of its questions the last is held out: no memory is trained on it.
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
        ["My name is {v}.", "I am called {v}.", "They call me {v}.", "I am {v}.", "People call me {v}.",
         "Everybody calls me {v}.", "My first name is {v}.", "The name my parents gave me is {v}.",
         "You can call me {v}."],
        ["I changed my name to {v}.", "My name is now {v}."],
        ["What is my name?", "What am I called?", "Do you know my name?", "How do people call me?",
         "What is my first name?", "Can you tell me my name?", "By what name do people know me?",
         "Which name did my parents give me?", "What do they call me?", "Who am I?"],
        ["Your name is {v}.", "You are called {v}."],
    ),
    "home": (
        "city",
        ["I live in {v}.", "My home is in {v}.", "My flat is in {v}.", "I have a house in {v}.", "We live in {v}.",
         "My house is in {v}.", "The city I live in is {v}.", "I have my home in {v}.", "You can find my house in {v}.",
         "Home for me is {v}."],
        ["I moved to {v}.", "I now live in {v}."],
        ["Where do I live?", "Which city do I live in?", "Where is my home?", "Where is my house?",
         "What city is my home?", "Can you say where I live?", "In which city do you find my house?",
         "Which city do we live in?", "What is the city of my home?", "In which city is my flat?"],
        ["You live in {v}.", "Your home is in {v}."],
    ),
    "born": (
        "city",
        ["I was born in {v}.", "My birthplace is {v}.", "I came into the world in {v}.",
         "My mother gave birth to me in {v}.", "The city of my birth is {v}.", "My parents had me in {v}.",
         "{v} is my birthplace.", "My life began in {v}."],
        ["I was wrong, I was born in {v}.", "In fact I was born in {v}."],
        ["Where was I born?", "Which city was I born in?", "What is my birthplace?",
         "In which city did I come into the world?", "Where did my mother give birth to me?",
         "What is the city of my birth?", "Which city is my birthplace?", "Can you say where I was born?",
         "Where did my life begin?"],
        ["You were born in {v}.", "Your birthplace is {v}."],
    ),
    "office": (
        "city",
        ["My office is in {v}.", "I work in {v}.", "I go to work in {v}.", "My company sits in {v}.",
         "The city I work in is {v}.", "You find my office in {v}.", "The office of my company is in {v}.",
         "My desk is in {v}."],
        ["My office moved to {v}.", "I now work in {v}."],
        ["Where is my office?", "Where do I work?", "Which city do I work in?", "In which city is my office?",
         "Where do I go to work?", "Where does my company sit?", "Which city is my company in?",
         "Can you say where my office is?", "Where is my desk?"],
        ["Your office is in {v}.", "You work in {v}."],
    ),
    "job": (
        "job",
        ["I work as a {v}.", "I am a {v}.", "My job is {v}.", "I earn my money as a {v}.", "I make my living as a {v}.",
         "My work is that of a {v}.", "They pay me as a {v}.", "By trade I am a {v}."],
        ["I became a {v}.", "I now work as a {v}."],
        ["What is my job?", "What do I work as?", "How do I earn my money?", "Which job do I have?",
         "What work do I do?", "As what do they pay me?", "How do I make my living?", "Can you say what my job is?",
         "What is my trade?"],
        ["You work as a {v}.", "You are a {v}."],
    ),
    "father_job": (
        "job",
        ["My father is a {v}.", "My father works as a {v}.", "The job of my father is {v}.", "My dad is a {v}.",
         "My father has the job of a {v}.", "The work of my father is that of a {v}.", "My father is paid as a {v}.",
         "My dad earns his money as a {v}."],
        ["My father became a {v}.", "My father now works as a {v}."],
        ["What is the job of my father?", "What does my father work as?", "What does my dad do?",
         "Which job does my father have?", "What is my father?", "What is the work of my father?",
         "As what is my father paid?", "Can you say what my father does?", "How does my dad earn his money?"],
        ["Your father works as a {v}.", "Your father is a {v}."],
    ),
    "pet": (
        "animal",
        ["I have a {v}.", "My pet is a {v}.", "I keep a {v} at home.", "I own a {v}.", "My pet at home is a {v}.",
         "The pet I own is a {v}.", "I have got a {v} as a pet.", "I feed a {v} at home.", "A {v} lives with me."],
        ["I now have a {v}.", "My new pet is a {v}."],
        ["What pet do I have?", "Which animal do I keep?", "What kind of pet do I own?", "Which pet do I own?",
         "What pet is at my home?", "What kind of animal do I have?", "Which animal do I feed at home?",
         "Can you say what pet I have?", "Which animal lives with me?"],
        ["You have a {v}.", "Your pet is a {v}."],
    ),
    "favourite_animal": (
        "animal",
        ["My favourite animal is the {v}.", "The animal I love most is the {v}.", "I think the {v} is the best animal.",
         "I like the {v} more than other animals.", "For me the best animal is the {v}.",
         "Of all animals I like the {v}.", "I love the {v} most of all animals.", "No animal is as nice as the {v}."],
        ["My favourite animal is now the {v}.", "Now the animal I love most is the {v}."],
        ["What is my favourite animal?", "Which animal do I love most?", "Which animal is the best for me?",
         "Which animal do I like most?", "What animal is my favourite?", "Of all animals, which do I like?",
         "Which is the animal that I love?", "Can you say which animal I love most?", "Which animal do I find nice?"],
        ["Your favourite animal is the {v}.", "The animal you love most is the {v}."],
    ),
    "dog_name": (
        "pet_name",
        ["My dog is called {v}.", "The name of my dog is {v}.", "I named my dog {v}.", "I call my dog {v}.",
         "I have a dog called {v}.", "Our dog has the name {v}.", "{v} is the name of my dog.",
         "I gave my dog the name {v}.", "My dog listens to the name {v}."],
        ["My new dog is called {v}.", "My dog is now called {v}."],
        ["What is my dog called?", "What is the name of my dog?", "How did I name my dog?",
         "Which name does my dog have?", "What name did I give my dog?", "How is my dog named?",
         "Do you know the name of my dog?", "Can you say what my dog is called?", "What do I call my dog?"],
        ["Your dog is called {v}.", "The name of your dog is {v}."],
    ),
    "cat_name": (
        "pet_name",
        ["My cat is called {v}.", "The name of my cat is {v}.", "I named my cat {v}.", "I call my cat {v}.",
         "I have a cat called {v}.", "Our cat has the name {v}.", "{v} is the name of my cat.",
         "I gave my cat the name {v}.", "My cat listens to the name {v}."],
        ["My new cat is called {v}.", "My cat is now called {v}."],
        ["What is my cat called?", "What is the name of my cat?", "How did I name my cat?",
         "Which name does my cat have?", "What name did I give my cat?", "How is my cat named?",
         "Do you know the name of my cat?", "Can you say what my cat is called?", "What do I call my cat?"],
        ["Your cat is called {v}.", "The name of your cat is {v}."],
    ),
    "favourite_colour": (
        "colour",
        ["My favourite colour is {v}.", "I like {v} more than other colours.", "The colour I love most is {v}.",
         "For me the best colour is {v}.", "Of all colours I like {v}.", "My best colour is {v}.",
         "{v} is the colour that I love.", "I love the colour {v}.", "No colour is as nice as {v}."],
        ["My favourite colour is now {v}.", "Now the colour I love most is {v}."],
        ["What is my favourite colour?", "Which colour do I like?", "Which colour do I love most?",
         "Of all colours, which do I like?", "What colour do I love?", "Which colour is my favourite?",
         "Which colour do I like more than others?", "Can you say what my favourite colour is?",
         "What is the best colour for me?"],
        ["Your favourite colour is {v}.", "The colour you love most is {v}."],
    ),
    "car_colour": (
        "colour",
        ["My car is {v}.", "I drive a {v} car.", "The colour of my car is {v}.", "I own a {v} car.",
         "I have a {v} car.", "My car has the colour {v}.", "{v} is the colour of my car.", "The car I drive is {v}."],
        ["I painted my car {v}.", "My new car is {v}."],
        ["What colour is my car?", "What is the colour of my car?", "Which colour does my car have?",
         "Which colour is my car?", "What colour of car do I own?", "What does my car look like, which colour?",
         "Do you know the colour of my car?", "Can you say what colour my car has?", "What colour is the car I drive?"],
        ["Your car is {v}.", "The colour of your car is {v}."],
    ),
    "door_colour": (
        "colour",
        ["My door is {v}.", "The door of my house is {v}.", "I have a {v} door.", "The colour of my door is {v}.",
         "My house has a {v} door.", "My door has the colour {v}.", "{v} is the colour of my door.",
         "You enter my house by a {v} door."],
        ["I painted my door {v}.", "My door is now {v}."],
        ["What colour is my door?", "What is the colour of my door?", "Which colour does my door have?",
         "Which colour is my door?", "What colour of door do I have?", "What colour did I paint my door?",
         "Do you know the colour of my door?", "Can you say what colour my door has?",
         "What colour is the door of my house?"],
        ["Your door is {v}.", "The colour of your door is {v}."],
    ),
    "favourite_food": (
        "food",
        ["My favourite food is {v}.", "I love to eat {v}.", "The food I love most is {v}.",
         "Nothing tastes as good as {v}.", "Of all food I like {v}.", "The best food for me is {v}.",
         "I like {v} more than other food.", "I could eat {v} every day."],
        ["My favourite food is now {v}.", "Now I love to eat {v}."],
        ["What is my favourite food?", "What do I love to eat?", "Which food do I love most?",
         "Which food is my favourite?", "Of all food, which do I like?", "What is the best food for me?",
         "What food do I like?", "Can you say what I love to eat?", "What could I eat every day?"],
        ["Your favourite food is {v}.", "You love to eat {v}."],
    ),
    "lunch": (
        "food",
        ["I had {v} for lunch.", "For lunch I ate {v}.", "My lunch was {v}.", "There was {v} for lunch.",
         "I took {v} for my lunch.", "They gave me {v} for lunch.", "I ate {v} for lunch today.", "At noon I ate {v}."],
        ["I was wrong, I had {v} for lunch.", "In fact my lunch was {v}."],
        ["What did I have for lunch?", "What was my lunch?", "What was there for lunch?", "What did I eat for lunch?",
         "What did they give me for lunch?", "Which food was my lunch?", "What did I take for lunch today?",
         "Can you say what my lunch was?", "What did I eat at noon?"],
        ["You had {v} for lunch.", "Your lunch was {v}."],
    ),
    "favourite_drink": (
        "drink",
        ["My favourite drink is {v}.", "I love to drink {v}.", "The drink I love most is {v}.",
         "Of all drinks I like {v}.", "The best drink for me is {v}.", "I like {v} more than other drinks.",
         "No drink is as good as {v}."],
        ["My favourite drink is now {v}.", "Now I love to drink {v}."],
        ["What is my favourite drink?", "What do I love to drink?", "Which drink do I love most?",
         "Which drink is my favourite?", "Of all drinks, which do I like?", "What is the best drink for me?",
         "What drink do I like?", "Can you say what I love to drink?", "Which drink is good for me?"],
        ["Your favourite drink is {v}.", "You love to drink {v}."],
    ),
    "morning_drink": (
        "drink",
        ["In the morning I drink {v}.", "I start the day with {v}.", "I have {v} for breakfast.",
         "My day begins with a cup of {v}.", "At breakfast I drink {v}.", "My morning begins with {v}.",
         "The drink of my morning is {v}.", "A cup of {v} wakes me up."],
        ["Now I drink {v} in the morning.", "Now I start the day with {v}."],
        ["What do I drink in the morning?", "What do I start the day with?", "What do I have for breakfast?",
         "What do I drink at breakfast?", "What does my day begin with?", "Which drink do I have in the morning?",
         "What does my morning begin with?", "Can you say what I drink in the morning?", "What wakes me up?"],
        ["In the morning you drink {v}.", "You start the day with {v}."],
    ),
    "sport": (
        "sport",
        ["My sport is {v}.", "I do {v} every week.", "The sport I do is {v}.", "I train {v}.",
         "Every week I go to {v}.", "My own sport is {v}.", "I am good at {v}.", "I practise {v}.",
         "I am in a club for {v}."],
        ["My sport is now {v}.", "I now train {v}."],
        ["What is my sport?", "Which sport do I do?", "What do I train?", "What sport do I train?",
         "Which sport is mine?", "What sport do I do every week?", "Which sport do I practise?",
         "Can you say what my sport is?", "What is my club for?"],
        ["Your sport is {v}.", "You train {v}."],
    ),
    "watched_sport": (
        "sport",
        ["I like to watch {v}.", "On television I watch {v}.", "I am a fan of {v}.", "The sport I watch is {v}.",
         "The sport I like to watch is {v}.", "My television shows {v}.", "I look at {v} on television.",
         "I never miss {v} on television."],
        ["Now I like to watch {v}.", "Now I am a fan of {v}."],
        ["Which sport do I watch?", "What do I like to watch?", "What am I a fan of?", "What sport do I like to watch?",
         "Which sport am I a fan of?", "What do I watch on television?", "What do I look at on television?",
         "Can you say which sport I watch?", "What do I never miss on television?"],
        ["You like to watch {v}.", "You are a fan of {v}."],
    ),
    "instrument": (
        "instrument",
        ["I play the {v}.", "My instrument is the {v}.", "I make music on the {v}.", "I have lessons on the {v}.",
         "The instrument I play is the {v}.", "I can play the {v}.", "I learned to play the {v}.",
         "In the band I play the {v}."],
        ["I now play the {v}.", "My new instrument is the {v}."],
        ["Which instrument do I play?", "What is my instrument?", "What do I make music on?",
         "What instrument can I play?", "Which instrument is mine?", "What do I have lessons on?",
         "Which instrument did I learn?", "Can you say which instrument I play?", "What do I play in the band?"],
        ["You play the {v}.", "Your instrument is the {v}."],
    ),
    "hobby": (
        "hobby",
        ["My hobby is {v}.", "In my free time I enjoy {v}.", "I spend my evenings with {v}.",
         "My great passion is {v}.", "What I like to do is {v}.", "The hobby I have is {v}.", "I enjoy {v}.",
         "I use my free time for {v}.", "I relax with {v}."],
        ["My new hobby is {v}.", "In my free time I now enjoy {v}."],
        ["What is my hobby?", "What do I enjoy in my free time?", "What is my great passion?", "Which hobby do I have?",
         "What do I do in my free time?", "What do I use my free time for?", "What is it that I enjoy?",
         "Can you say what my hobby is?", "How do I spend my evenings?"],
        ["Your hobby is {v}.", "In your free time you enjoy {v}."],
    ),
    "lucky_number": (
        "number",
        ["My lucky number is {v}.", "The number {v} brings me luck.", "I always bet on {v}.",
         "My number is {v}, it brings me luck.", "I bet on the number {v}.", "For me {v} is a lucky number.",
         "My luck lies in the number {v}."],
        ["My lucky number is now {v}.", "Now the number {v} brings me luck."],
        ["What is my lucky number?", "Which number brings me luck?", "Which number do I bet on?",
         "What number do I always bet on?", "Which number is lucky for me?", "What number brings me luck?",
         "Which is my lucky number?", "Can you say what my lucky number is?", "In which number lies my luck?"],
        ["Your lucky number is {v}.", "The number {v} brings you luck."],
    ),
    "house_number": (
        "number",
        ["My house number is {v}.", "I live at number {v}.", "The number on my house is {v}.",
         "My address has the number {v}.", "You find my house at number {v}.", "I have house number {v}.",
         "My house has the number {v}."],
        ["My house number is now {v}.", "I moved to number {v}."],
        ["What is my house number?", "At which number do I live?", "Which number does my house have?",
         "What number do I live at?", "Which house number do I have?", "At what number do you find my house?",
         "Which number has my address?", "Can you say what my house number is?", "Which number is on my house?"],
        ["Your house number is {v}.", "You live at number {v}."],
    ),
    "birthday": (
        "month",
        ["My birthday is in {v}.", "I have my birthday in {v}.", "I turn a year older in {v}.",
         "The month of my birthday is {v}.", "I celebrate my birthday in {v}.",
         "I have a party for my birthday in {v}.", "I am a year older from {v} on.", "I get my presents in {v}."],
        ["I was wrong, my birthday is in {v}.", "In fact my birthday is in {v}."],
        ["When is my birthday?", "In which month is my birthday?", "When do I turn a year older?",
         "What is the month of my birthday?", "Which month do I have my birthday in?",
         "When do I celebrate my birthday?", "When am I a year older?", "Can you say when my birthday is?",
         "When do I get my presents?"],
        ["Your birthday is in {v}.", "You have your birthday in {v}."],
    ),
    "holiday": (
        "month",
        ["I go on holiday in {v}.", "My holiday is in {v}.", "I have time off in {v}.",
         "The month of my holiday is {v}.", "I take my holiday in {v}.", "I am free in {v}.",
         "I travel on holiday in {v}.", "In {v} I do not work."],
        ["My holiday is now in {v}.", "I moved my holiday to {v}."],
        ["When do I go on holiday?", "In which month is my holiday?", "When do I have time off?",
         "What is the month of my holiday?", "Which month do I have time off in?", "When do I take my holiday?",
         "When am I free?", "Can you say when I go on holiday?", "When do I not work?"],
        ["You go on holiday in {v}.", "Your holiday is in {v}."],
    ),
    "learned_language": (
        "language",
        ["I am learning {v}.", "I study {v}.", "I take a course in {v}.", "I have begun to learn {v}.",
         "The language I study is {v}.", "My language course is in {v}.", "I have lessons in {v}.",
         "I want to learn {v}.", "I try to speak {v}."],
        ["I am now learning {v}.", "My new language course is in {v}."],
        ["Which language am I learning?", "Which language do I study?", "What do I take a course in?",
         "What language do I learn?", "Which language is my course in?", "Which language have I begun to learn?",
         "What language do I have lessons in?", "Can you say which language I study?",
         "Which language do I try to speak?"],
        ["You are learning {v}.", "You study {v}."],
    ),
    "mother_tongue": (
        "language",
        ["My mother tongue is {v}.", "At home we speak {v}.", "I grew up with {v}.", "My parents speak {v} with me.",
         "The language of my home is {v}.", "My parents taught me {v}.", "With my mother I speak {v}.",
         "As a child I spoke {v}."],
        ["I was wrong, my mother tongue is {v}.", "In fact at home we speak {v}."],
        ["What is my mother tongue?", "Which language do we speak at home?", "Which language did I grow up with?",
         "Which language is my mother tongue?", "What language do my parents speak with me?",
         "What do we speak at home?", "What language did my parents teach me?", "Can you say what my mother tongue is?",
         "What did I speak as a child?"],
        ["Your mother tongue is {v}.", "At home you speak {v}."],
    ),
    "dream_country": (
        "country",
        ["I want to visit {v}.", "I dream of a trip to {v}.", "One day I will travel to {v}.",
         "The country I want to visit is {v}.", "I plan a trip to {v}.", "I hope to travel to {v}.",
         "I would love to go to {v}.", "My dream is to see {v}."],
        ["Now I want to visit {v}.", "Now I dream of a trip to {v}."],
        ["Which country do I want to visit?", "Where do I dream of a trip to?", "Where will I travel one day?",
         "Where do I want to travel?", "What country do I hope to visit?", "Which country will I travel to one day?",
         "Where would I love to go?", "Can you say which country I want to visit?", "Which country is my dream?"],
        ["You want to visit {v}.", "You dream of a trip to {v}."],
    ),
    "fruit": (
        "fruit",
        ["My favourite fruit is {v}.", "Of all fruit I like {v}.", "The fruit I buy is {v}.",
         "The fruit I love is {v}.", "I buy {v} in the shop.", "I like {v} more than other fruit.",
         "The best fruit for me are {v}.", "My basket is full of {v}."],
        ["My favourite fruit is now {v}.", "The fruit I buy is now {v}."],
        ["What is my favourite fruit?", "Which fruit do I like?", "Which fruit do I buy?", "What fruit do I love?",
         "Which fruit is my favourite?", "What fruit do I buy in the shop?", "Of all fruit, which do I like?",
         "Can you say which fruit I like?", "What is my basket full of?"],
        ["Your favourite fruit is {v}.", "You like {v}."],
    ),
    "flower": (
        "flower",
        ["My favourite flowers are {v}.", "Of all flowers I like {v}.", "I grow {v} in my garden.",
         "The flowers I love are {v}.", "I plant {v}.", "I like {v} more than other flowers.",
         "The best flowers for me are {v}.", "My garden is full of {v}."],
        ["My favourite flowers are now {v}.", "I now grow {v} in my garden."],
        ["What are my favourite flowers?", "Which flowers do I like?", "What do I grow in my garden?",
         "What flowers do I love?", "Which flowers are my favourite?", "What flowers do I plant?",
         "Of all flowers, which do I like?", "Can you say which flowers I grow?", "What is my garden full of?"],
        ["Your favourite flowers are {v}.", "You like {v}."],
    ),
    "subject": (
        "subject",
        ["My best subject is {v}.", "At school I like {v}.", "I get good marks in {v}.", "I am good at {v} in school.",
         "My favourite subject is {v}.", "At school I love {v}.", "Of all subjects I like {v}.",
         "The subject I enjoy is {v}."],
        ["My best subject is now {v}.", "Now I get good marks in {v}."],
        ["What is my best subject?", "What do I like at school?", "Which subject do I enjoy?",
         "What am I good at in school?", "Which subject is my best?", "What is my favourite subject?",
         "Which subject do I like at school?", "Can you say what my best subject is?", "What do I get good marks in?"],
        ["Your best subject is {v}.", "At school you like {v}."],
    ),
    "sister": (
        "name",
        ["My sister is called {v}.", "The name of my sister is {v}.", "I have a sister, {v}.",
         "I have a sister called {v}.", "My sister has the name {v}.", "We call my sister {v}.", "{v} is my sister."],
        ["My sister is now called {v}.", "My sister changed her name to {v}."],
        ["What is my sister called?", "What is the name of my sister?", "Who is my sister?",
         "Which name does my sister have?", "What do we call my sister?", "Do you know the name of my sister?",
         "What name did my sister get?", "Can you say who my sister is?", "How is my sister called?"],
        ["Your sister is called {v}.", "The name of your sister is {v}."],
    ),
    "brother": (
        "name",
        ["My brother is called {v}.", "The name of my brother is {v}.", "I have a brother, {v}.",
         "I have a brother called {v}.", "My brother has the name {v}.", "We call my brother {v}.",
         "{v} is my brother."],
        ["My brother is now called {v}.", "My brother changed his name to {v}."],
        ["What is my brother called?", "What is the name of my brother?", "Who is my brother?",
         "Which name does my brother have?", "What do we call my brother?", "Do you know the name of my brother?",
         "What name did my brother get?", "Can you say who my brother is?", "How is my brother called?"],
        ["Your brother is called {v}.", "The name of your brother is {v}."],
    ),
    "friend": (
        "name",
        ["My best friend is {v}.", "The name of my best friend is {v}.", "I have a good friend, {v}.",
         "I have a best friend called {v}.", "My best friend has the name {v}.", "Of all my friends {v} is the best.",
         "{v} is my best friend."],
        ["My best friend is now {v}.", "Now {v} is my best friend."],
        ["Who is my best friend?", "What is the name of my best friend?", "What is my best friend called?",
         "Which name does my best friend have?", "Of all my friends, who is the best?",
         "Do you know the name of my best friend?", "Which friend is my best?", "Can you say who my best friend is?",
         "How is my good friend called?"],
        ["Your best friend is {v}.", "The name of your best friend is {v}."],
    ),
    "boss": (
        "name",
        ["My boss is {v}.", "The name of my boss is {v}.", "I work for {v}.", "I have a boss called {v}.",
         "My boss has the name {v}.", "The one I work for is {v}.", "{v} is my boss."],
        ["My new boss is {v}.", "Now I work for {v}."],
        ["Who is my boss?", "What is the name of my boss?", "Who do I work for?", "Which name does my boss have?",
         "What is my boss called?", "Do you know the name of my boss?", "For whom do I work?",
         "Can you say who my boss is?", "How is my boss called?"],
        ["Your boss is {v}.", "You work for {v}."],
    ),
}  # fmt: skip

# in front of a statement that begins with a small letter after it, and of a question
STATEMENT_OPENINGS = [
    "",
    "",
    "",
    "By the way, ",
    "You should know that ",
    "Just so you know, ",
    "Let me tell you that ",
]
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
